"""What a plan shows of itself: frames, pictures, and how it differs from another. They are methods of ``Plan``.

Pictures take ``ax=`` and return Axes; without it they make a figure that a notebook shows. pandas and matplotlib are
imported at the first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moa_search.errors import ConfigError
from moa_search.formats.tiers import PLAIN
from moa_search.masks import span_mask
from moa_search.spans import SpanRule

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.axes import Axes

    from moa_search.formats.plan import Plan, PlanLike

MASK_POINTS = 512
"""Positions along each side of a picture of a mask: more than a figure has pixels for."""

SHORTEST = 64
"""Tokens that densities are drawn from on."""


def usual_lengths(plan: Plan) -> list[int]:
    """Lengths in tokens that the plan was made for, else a quarter, half and all of the model's context."""
    return [metrics.length for metrics in plan.predicted] or plan.model.usual_lengths


def density_lengths(plan: Plan) -> list[int]:
    """From 64 tokens up to the model's context, eight per octave: where `plot_density` draws by default."""
    longest = max(*plan.model.usual_lengths, *plan.lengths, SHORTEST + 1)
    steps = int(np.ceil(8 * np.log2(longest / SHORTEST))) + 1
    return sorted({round(n) for n in np.geomspace(SHORTEST, longest, steps)})


def rule_text(plan: Plan, layer: int, kv_head: int) -> str:
    """The exact rule of one head, such as ``0.25n-512`` or ``dense``; of a native layer, its own window.

    Where fewer than 16 bits are stored, those of keys and of values follow: ``0.25n-512, 4/8 bits``.
    """
    pattern = plan.patterns[layer][kv_head]
    if pattern.kind == "native":
        return f"own window, {plan.native_window}"
    bits = "" if pattern.tier == PLAIN else ", {}/{} bits".format(*pattern.tier)
    return f"{pattern.rule}{bits}"


def to_frame(plan: Plan, lengths: int | Sequence[int] = ()) -> pd.DataFrame:
    """The plan as a tidy frame, one row per length, layer and KV head.

    Args:
        plan: The plan.
        lengths: Context lengths in tokens, or one; by default `lengths`.

    Returns:
        Columns ``length``, ``layer``, ``kv_head``, ``kind``, ``rule``, ``alpha`` and ``beta`` (missing in native
        layers), ``span`` in tokens, ``share``, which is span / length, and ``key_bits`` and ``value_bits``.
    """
    import pandas as pd

    rows = []
    for length in _checked(plan, lengths):
        for layer, heads in enumerate(plan.spans(length)):
            for head, tokens in enumerate(heads):
                pattern = plan.patterns[layer][head]
                rule = None if pattern.kind == "native" else pattern.rule
                rows.append(
                    {
                        "length": length,
                        "layer": layer,
                        "kv_head": head,
                        "kind": pattern.kind,
                        "rule": plan.rule_text(layer, head),
                        "alpha": rule.alpha if rule else None,
                        "beta": rule.beta if rule else None,
                        "span": tokens,
                        "share": tokens / length,
                        "key_bits": pattern.tier[0],
                        "value_bits": pattern.tier[1],
                    }
                )
    return pd.DataFrame(rows).astype({"alpha": "Int64", "beta": "Float64"})


def by_length(plan: Plan, lengths: int | Sequence[int] = ()) -> pd.DataFrame:
    """What the plan keeps, computes and is predicted to lose, one row per length.

    Args:
        plan: The plan.
        lengths: Context lengths in tokens, or one; by default `lengths`.

    Returns:
        Columns ``length``, ``density``, ``share`` and ``attention_density`` (shares of tokens, of bytes and of the
        prefill, native layers aside), ``kv_bytes`` (of keys and values as the plan stores them, what is plain in 16
        bits, native layers' too), and where the plan predicts them ``loss``, ``loss_error`` and
        ``extrapolated``.
    """
    import pandas as pd

    rows, at = [], _checked(plan, lengths)
    predicted = {metrics.length: metrics for metrics in plan.predicted}
    for length, computed in zip(at, plan.attention_densities(at), strict=True):
        known = predicted.get(length)
        rows.append(
            {
                "length": length,
                "density": plan.density(length),
                "share": plan.share(length),
                "attention_density": computed,
                "kv_bytes": plan.kv_bytes(length),
                "loss": known and known.loss,
                "loss_error": known and known.loss_error,
                "extrapolated": known is not None and known.extrapolated,
            }
        )
    return pd.DataFrame(rows)


def diff(plan: Plan, other: PlanLike, lengths: int | Sequence[int] = ()) -> pd.DataFrame:
    """The KV heads that ``other`` treats differently, one row per length, layer and KV head.

    Args:
        plan: The plan.
        other: A plan for the same model, or its file or content.
        lengths: Context lengths in tokens, or one; by default `lengths` of both.

    Returns:
        Columns ``length``, ``layer``, ``kv_head``, ``rule``, ``other_rule``, ``span``, ``other_span`` and
        ``change``, which is other_span - span. No row where rules and spans are the same; rules that are the same
        can have different spans where sink or block differ.

    Raises:
        ModelMismatchError: The plans are for different models.
    """
    other = plan.of(other, "other")
    plan.model.require(other.model, "the plan to compare with")
    wanted = sorted({*_checked(plan, lengths), *_checked(other, lengths)})
    keys = ["length", "layer", "kv_head"]
    mine, theirs = plan.to_frame(wanted)[[*keys, "rule", "span"]], other.to_frame(wanted)[[*keys, "rule", "span"]]
    both = mine.merge(theirs.rename(columns={"rule": "other_rule", "span": "other_span"}), on=keys)
    both = both[[*keys, "rule", "other_rule", "span", "other_span"]]
    both["change"] = both["other_span"] - both["span"]
    return both[(both["change"] != 0) | (both["rule"] != both["other_rule"])].reset_index(drop=True)


def plot_spans(plan: Plan, length: int | None = None, *, ax: Axes | None = None) -> Axes:
    """Heat map of the share of the context that each layer and KV head keeps.

    Native layers are grey: they keep the model's own window whatever the plan says.

    Args:
        plan: The plan.
        length: Context length in tokens; by default the longest of `lengths`.
        ax: Axes to draw on.
    """
    from moa_search.pictures import draw_cells

    at = _one(plan, length)
    native = plan.native_layers
    return draw_cells(
        plan.shares(at),
        ax,
        title=f"{at} tokens: keeps {kept_text(plan, at)}",
        label="span / n",
        limits=(0, 1),
        xlabel=f"layer (grey: own window, {plan.native_window})" if native else "layer",
    )


def plot_diff(plan: Plan, other: PlanLike, length: int | None = None, *, ax: Axes | None = None) -> Axes:
    """Heat map of how much more (purple) or less (orange) of the context ``other`` keeps.

    Args:
        plan: The plan.
        other: A plan for the same model, or its file or content.
        length: Context length in tokens; by default the longest of `lengths`.
        ax: Axes to draw on.

    Raises:
        ModelMismatchError: The plans are for different models.
    """
    from moa_search.pictures import draw_cells

    other = plan.of(other, "other")
    plan.model.require(other.model, "the plan to compare with")
    at = _one(plan, length)
    return draw_cells(
        other.shares(at) - plan.shares(at),
        ax,
        title=f"{at} tokens: {plan.density(at):.1%} of the KV cache, {other.density(at):.1%} in the other",
        label="change of span / n",
        limits=(-1, 1),
        colours="PuOr",
    )


def plot_mask(plan: Plan, layer: int, head: int, n: int, *, ax: Axes | None = None) -> Axes:
    """Which keys the queries of one KV head attend.

    Args:
        plan: The plan.
        layer: Layer.
        head: KV head.
        n: Tokens of the sequence.
        ax: Axes to draw on.

    Raises:
        ConfigError: The model has no such layer or KV head.
    """
    from moa_search.pictures import draw_mask

    n = _one(plan, n)
    plan.model.require_head(layer, head)
    kept = f"{plan.spans(n)[layer][head] / n:.1%}"
    return draw_mask(
        _mask(plan, layer, head, n),
        n,
        ax,
        title=f"layer {layer}, KV head {head}: {plan.rule_text(layer, head)}\n{kept} kept at {n} tokens",
        native=layer in plan.native_layers,
    )


def plot_density(plan: Plan, lengths: Sequence[int] = (), *, ax: Axes | None = None) -> Axes:
    """Shares of tokens and bytes that are kept and of the prefill that is computed, over the length; budgets as marks.

    Args:
        plan: The plan.
        lengths: Context lengths in tokens; by default `density_lengths`.
        ax: Axes to draw on.
    """
    from moa_search.pictures import draw_lines

    at = sorted(_checked(plan, lengths or plan.density_lengths))
    lines = {"tokens kept": [100 * plan.density(n) for n in at]}
    if not plan.is_plain:
        lines["bytes kept"] = [100 * plan.share(n) for n in at]
    lines["prefill computed"] = [100 * share for share in plan.attention_densities(at)]
    ax = draw_lines(at, lines, ax, title="", xlabel="context (tokens)", ylabel="share of dense (%)")
    bounds = [(budget.length, budget.density or budget.share) for budget in _budgets(plan)]
    budgets = [(length, 100 * bound) for length, bound in bounds if bound is not None]
    if budgets:
        ink = ax.xaxis.label.get_color()
        ax.plot(*zip(*budgets, strict=True), "_", color=ink, markersize=14, markeredgewidth=2, label="budget")
        ax.legend(frameon=False)
    return ax


def to_html(plan: Plan) -> str:
    """A small heat map with every head's rule under the mouse, and what the plan keeps."""
    from moa_search.pictures import cell_grid, hex_colours, notebook_html

    at = _one(plan, None)
    origin = plan.provenance
    found = f", {origin.how}" if origin else ""
    grid = cell_grid(
        hex_colours(plan.shares(at), low=0, high=1),
        plan.cell_texts(at),
        label=f"Share of {at} tokens kept by layer and KV head",
        focusable=False,
    )
    kept = plan.by_length()[["length", "density", "share", "attention_density"]]
    rows = [[n, *(f"{share:.1%}" for share in shares)] for n, *shares in kept.itertuples(index=False)]
    about = (
        f"for {plan.model.architecture}, {plan.model.num_hidden_layers} layers of {plan.model.num_key_value_heads} KV "
        f"heads{found}; colours at {at} tokens"
    )
    return notebook_html("Plan", about, grid, ["tokens", "tokens kept", "bytes kept", "prefill computed"], rows)


def kept_text(plan: Plan, length: int) -> str:
    """What the plan keeps at ``length`` tokens, in words: of the tokens and, where it stores fewer bits, the bytes."""
    tokens = f"{plan.density(length):.1%} of the tokens"
    return tokens if plan.is_plain else f"{tokens} in {plan.share(length):.1%} of the bytes"


def cell_texts(plan: Plan, length: int) -> list[list[str]]:
    """Of each layer and KV head its exact rule and its span at ``length`` tokens, in words."""
    return [
        [
            f"layer {layer}, KV head {head}: {plan.rule_text(layer, head)}; {tokens} of {length} tokens "
            f"({tokens / length:.1%})"
            for head, tokens in enumerate(heads)
        ]
        for layer, heads in enumerate(plan.spans(length))
    ]


def shares(plan: Plan, length: int) -> npt.NDArray[np.float64]:
    """Span over ``length`` of every head, ``[layer, kv_head]``; NaN in native layers."""
    shares = np.array(plan.spans(length), dtype=np.float64) / length
    shares[list(plan.native_layers)] = np.nan
    return shares


def _mask(plan: Plan, layer: int, kv_head: int, n: int) -> npt.NDArray[np.bool_]:
    """``[query, key]`` at `MASK_POINTS` positions at most; native layers know no sink."""
    if layer in plan.native_layers:
        rule = SpanRule(plan.native_window or n, 0)
        return span_mask(rule, n, sink=0, min_span=1, most_points=MASK_POINTS)
    rule = plan.rules[layer][kv_head]
    if plan.anchor == "prompt":
        rule = SpanRule(plan.spans(n)[layer][kv_head], 0)
    return span_mask(rule, n, sink=plan.sink, min_span=plan.min_span, most_points=MASK_POINTS)


def _checked(plan: Plan, lengths: int | Iterable[int]) -> list[int]:
    """The lengths, or `lengths` where there are none."""
    wanted = [lengths] if isinstance(lengths, int) else list(lengths) or plan.lengths
    if min(wanted) < 1:
        raise ConfigError(f"length {min(wanted)} is out of range; it must be at least 1 token")
    return wanted


def _one(plan: Plan, length: int | None) -> int:
    return max(plan.lengths) if length is None else _checked(plan, [length])[0]


def _budgets(plan: Plan) -> Sequence[Any]:
    origin = plan.provenance
    return origin.budgets if origin else ()
