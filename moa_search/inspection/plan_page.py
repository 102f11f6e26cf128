"""A plan as a page: spans with their rules, density over length, cost per layer, masks, its front, where it is from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from moa_search.errors import ConfigError
from moa_search.formats import Plan, Profile
from moa_search.inspection.charts import chart, draw_layers
from moa_search.inspection.grids import HOW_TO_READ
from moa_search.inspection.pages import Page, figure_block, paragraph, table_block
from moa_search.inspection.sections import front_blocks, new_page, origin_facts, share, span_blocks
from moa_search.inspection.tables import predicted_loss
from moa_search.search import Front
from moa_search.search.losses import plan_losses

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes

__all__ = ["layer_losses", "plan_page", "telling_heads"]

MASKS = 4
"""Heads whose masks are shown unless some are chosen."""

DEFAULT_CRITERION = "signed"


def plan_page(
    plan: Plan,
    *,
    title: str = "Plan",
    lengths: Sequence[int] = (),
    heads: Sequence[tuple[int, int]] = (),
    front: Front | None = None,
    profile: Profile | None = None,
) -> Page:
    """The page of a plan.

    Args:
        plan: The plan.
        title: Of the page.
        lengths: Context lengths in tokens; by default those that the plan was made for.
        heads: Layers and KV heads to show masks of; by default some from the longest to the shortest span.
        front: The plans it was chosen from.
        profile: That predicts what each layer loses.

    Raises:
        ConfigError: The model has no such head, or the profile's sink or block isn't the plan's.
        ModelMismatchError: The profile is of another model.
    """
    for layer, head in heads:
        plan.model.require_head(layer, head)
    at = list(lengths) or plan.lengths
    longest = max(at)
    model, size = plan.model, _size(plan.kv_bytes(longest))
    page = new_page(
        title,
        f"{model.architecture}, {model.num_hidden_layers} layers of {model.num_key_value_heads} KV heads: keeps "
        f"{share(plan.density(longest))} of the KV cache at {longest} tokens, {size} of keys and values (16 bit)",
    )
    page.add("Spans", paragraph(_formula(plan)), paragraph(HOW_TO_READ), *span_blocks(plan, at))
    page.add("Density against length", *_density_blocks(plan, at))
    page.add("Cost per layer", *_layer_blocks(plan, longest, profile))
    shown = list(heads) or telling_heads(plan, longest)
    page.add(
        "Masks",
        paragraph(f"Which keys (across) each query (down) attends, at {longest} tokens."),
        f'<div class="masks">{"".join(_mask(plan, layer, head, longest) for layer, head in shown)}</div>',
    )
    if front is not None:
        page.add("Front", *front_blocks(front))
    page.add("Provenance", origin_facts(plan), *_validated(plan))
    return page


def telling_heads(plan: Plan, length: int, count: int = MASKS) -> list[tuple[int, int]]:
    """Heads with different rules, from the longest span to the shortest at equal distances."""
    first: dict[str, tuple[int, int, int]] = {}
    for layer, spans in enumerate(plan.spans(length)):
        for head, tokens in enumerate(spans):
            first.setdefault(plan.rule_text(layer, head), (-tokens, layer, head))
    ranked = sorted(first.values())
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    return [ranked[place][1:] for place in places]


def layer_losses(plan: Plan, profile: Profile) -> dict[int, npt.NDArray[np.float64]]:
    """The loss that a profile predicts for each layer, by profiled length, by the plan's own criterion.

    Returns:
        ``[layer]``, 0 in native layers.

    Raises:
        ConfigError: The profile's sink or block isn't the plan's.
        ModelMismatchError: The profile is of another model.
    """
    plan.model.require(profile.header.model, "the plan (beside the profile's model)")
    for name in ("sink", "block"):
        mine, measured = getattr(plan, name), getattr(profile.header, name)
        if mine != measured:
            raise ConfigError(f"profile: it was measured with {name} {measured}, the plan has {mine}")
    criterion = (plan.provenance.criterion if plan.provenance else None) or DEFAULT_CRITERION
    searched = profile.header.searchable_layers
    by_length, choice = plan_losses(profile, plan, criterion)
    found = {}
    for losses in by_length:
        per_layer = np.zeros(plan.model.num_hidden_layers)
        per_layer[searched] = losses.mean[np.arange(len(choice)), choice].reshape(len(searched), -1).sum(1)
        found[losses.length] = per_layer
    return found


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _formula(plan: Plan) -> str:
    anchor = "at every query's own position" if plan.anchor == "position" else "once, at the total length n"
    return (
        f"A rule is evaluated {anchor}. It gives the keys that a query of a context of n tokens attends: the first "
        f"{plan.sink} and the newest, never fewer than {plan.min_span} in all (or n), and never more than n. "
        "0.25n-512 is a quarter of the context, rounded down, less 512."
    )


def _density_blocks(plan: Plan, lengths: Sequence[int]) -> list[str]:
    predicted = {metrics.length: metrics for metrics in plan.predicted}
    at = sorted({*lengths, *plan.model.usual_lengths})
    rows = [
        {
            "tokens": n,
            "KV cache kept": share(plan.density(n)),
            "KV MiB (16 bit)": f"{plan.kv_bytes(n) / 2**20:.1f}",
            "prefill computed": share(computed),
            "predicted loss": predicted_loss(predicted[n]) if n in predicted else "",
        }
        for n, computed in zip(at, plan.attention_densities(at), strict=True)
    ]
    figure = chart(lambda ax: plan.plot_density(ax=ax))
    alt = "Share of the KV cache kept and of the prefill computed, over the context length"
    return [
        figure_block(figure, alt),
        table_block(pd.DataFrame(rows), "What it keeps, computes and is predicted to lose"),
    ]


def _layer_blocks(plan: Plan, length: int, profile: Profile | None) -> list[str]:
    """Memory per layer and, by a profile, predicted loss."""
    tokens = np.array(plan.spans(length)).sum(1)
    mebibytes = tokens * 2 * 2 * plan.model.head_dim / 2**20
    whole = length * plan.model.num_key_value_heads
    frame = pd.DataFrame(
        {"layer": range(len(tokens)), "KV MiB (16 bit)": mebibytes, "kept": tokens / whole},
    )
    losses = layer_losses(plan, profile) if profile is not None else {}
    for n, values in losses.items():
        frame[f"predicted loss @{n}"] = values
    formats = {name: (share if name == "kept" else "{:.4g}".format) for name in frame.columns[1:]}
    table = table_block(
        frame, f"Memory at {length} tokens" + (" and predicted loss" if losses else ""), formats=formats
    )
    native = plan.native_layers
    draw = partial(draw_layers, per_layer=mebibytes, native=native, ylabel=f"KV MiB at {length} tokens")
    blocks = [figure_block(chart(draw, height=2.6), f"Keys and values that each layer keeps at {length} tokens")]
    for n, values in losses.items():
        draw = partial(draw_layers, per_layer=values, native=native, ylabel=f"predicted loss at {n}")
        blocks.append(figure_block(chart(draw, height=2.6), f"Predicted loss of each layer at {n} tokens"))
    return [*blocks, f"<details><summary>Data as a table</summary>{table}</details>"]


def _mask(plan: Plan, layer: int, head: int, length: int) -> str:
    def draw(ax: Axes) -> None:
        plan.plot_mask(layer, head, length, ax=ax).set_title("", loc="left")  # the caption says it, and can wrap

    kept = share(plan.spans(length)[layer][head] / length)
    says = f"layer {layer}, KV head {head}: {plan.rule_text(layer, head)}; {kept} kept"
    return figure_block(chart(draw, width=3.1, height=3), f"Mask of {says}", caption=says)


def _validated(plan: Plan) -> list[str]:
    if not plan.validated:
        return []
    rows = [
        {
            "tokens": entry.length,
            "samples": entry.samples,
            "loss": f"{entry.loss:.4f}" + ("" if entry.loss_error is None else f" ± {entry.loss_error:.4f}"),
            "dense": None if entry.dense_loss is None else f"{entry.dense_loss:.4f}",
            "data": entry.data,
        }
        for entry in plan.validated
    ]
    return [table_block(pd.DataFrame(rows), "Held-out loss, nats per answer token", text=["data"])]
