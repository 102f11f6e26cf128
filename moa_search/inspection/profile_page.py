"""A profile as a page: what every head loses under a short window, whether samples were enough, where it is from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from moa_search.errors import ConfigError
from moa_search.formats import Profile
from moa_search.formats.profile_views import DECADES
from moa_search.inspection.charts import chart, draw_window_losses
from moa_search.inspection.grids import HOW_TO_READ, grid_block
from moa_search.inspection.pages import Page, facts, figure_block, paragraph, table_block
from moa_search.inspection.profiles import calibration_lines, heaviest_heads, profile_quality, sample_advice
from moa_search.inspection.sections import heading, new_page, share

__all__ = ["CURVES", "profile_page"]

CURVES = 4
"""Heads whose losses are drawn over the window unless some are chosen."""


def profile_page(
    profile: Profile,
    *,
    title: str = "Profile",
    lengths: Sequence[int] = (),
    heads: Sequence[tuple[int, int]] = (),
    criterion: str = "signed",
) -> Page:
    """The page of a profile.

    Args:
        profile: The profile.
        title: Of the page.
        lengths: Profiled lengths in tokens; by default all.
        heads: Layers and KV heads to draw losses of; by default those that lose most.
        criterion: How effects on the loss are summed up.

    Raises:
        ConfigError: A length or head wasn't profiled, or an unknown criterion.
    """
    header = profile.header
    for layer, head in heads:
        header.model.require_head(layer, head)
        if layer in header.native_layers:
            raise ConfigError(f"layer {layer} has a sliding window of its own, so it wasn't measured")
    at = list(lengths) or profile.lengths
    page = new_page(
        title,
        f"{header.model_name}: {header.model.architecture}, {header.model.num_hidden_layers} layers of "
        f"{header.model.num_key_value_heads} KV heads",
    )
    page.add("Influence", paragraph(HOW_TO_READ), *_influence_blocks(profile, at, criterion))
    page.add("Loss over window", *_curve_blocks(profile, at, list(heads), criterion))
    advice = sample_advice(profile)
    page.add("Samples", _quality_table(profile), *([] if advice is None else [paragraph(f"More samples? {advice}")]))
    entries: dict[str, object] = {}
    for line in calibration_lines(profile):
        name, _, value = line.partition("  ")
        entries[name] = value.strip()
    entries |= {
        "type of the weights": header.dtype,
        "sink, block": f"{header.sink}, {header.block} tokens",
        "seed": header.seed,
        "hash of the samples": header.calibration.get("hash"),
        "hash of the weights": header.weights_hash,
        "versions": ", ".join(f"{name} {version}" for name, version in header.versions.items()),
        "written by": f"moa-search {header.library_version}",
        "checksum": profile.checksum,
        "configuration": json.dumps({**header.model.rope, **header.model.config}, sort_keys=True),
    }
    page.add("Provenance", facts({name: value for name, value in entries.items() if value is not None}))
    return page


def _influence_blocks(profile: Profile, lengths: Sequence[int], criterion: str) -> list[str]:
    blocks = []
    for length in lengths:
        losses, _, window = profile.influence(length, criterion=criterion)
        top = float(np.nanmax(losses))
        blocks += [
            heading(f"{length} tokens, a window of {window}"),
            grid_block(
                profile.influence_colours(losses),
                profile.influence_texts(losses),
                f"{criterion.capitalize()} loss when one head attends {window} of {length} tokens, the others all",
                colours="cividis",
                scale=(f"{top / 10**DECADES:.2g} or less", f"{top:.3g}", f"{criterion} loss, logarithmic"),
                native=bool(profile.header.native_layers),
            ),
        ]
    return blocks


def _curve_blocks(profile: Profile, lengths: Sequence[int], heads: list[tuple[int, int]], criterion: str) -> list[str]:
    blocks = []
    frame = profile.to_frame([criterion])
    for length in lengths:
        shown = heads or heaviest_heads(profile, length, criterion, CURVES)
        draw = partial(draw_window_losses, profile=profile, length=length, heads=shown, criterion=criterion)
        rows = frame[frame["length"] == length].set_index(["layer", "kv_head"])
        columns = {"window": profile.by_length[length].header.windows}
        columns |= {f"layer {layer}, KV head {head}": rows.loc[(layer, head), criterion] for layer, head in shown}
        table = pd.DataFrame({name: list(values) for name, values in columns.items()})
        formats = dict.fromkeys(table.columns[1:], "{:.4g}".format)
        blocks.append(
            figure_block(
                chart(draw),
                f"{criterion.capitalize()} loss of some heads over their window, at {length} tokens",
                table=table_block(table, f"{criterion.capitalize()} loss at {length} tokens", formats=formats),
            )
        )
    return blocks


def _quality_table(profile: Profile) -> str:
    rows = [
        {
            "tokens": quality.length,
            "samples": quality.samples,
            "dense loss": f"{quality.loss:.3f} ± {quality.loss_error:.3f}",
            "local heads": share(quality.local_heads),
            "reliability": None if quality.reliability is None else f"{max(0.0, quality.reliability):.2f}",
        }
        for quality in profile_quality(profile)
    ]
    return table_block(pd.DataFrame(rows), "Samples, loss, heads that look nearby only, and reliability of the rest")
