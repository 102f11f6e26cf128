"""A profile as a page: what every head loses under a short window, whether samples were enough, where it is from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from moa_search.errors import ConfigError
from moa_search.formats import Profile
from moa_search.formats.profile_views import DECADES, influence_colours, influence_texts
from moa_search.inspection.charts import chart, draw_window_losses
from moa_search.inspection.frames.profiles import curve_frame, profile_provenance, profile_tables
from moa_search.inspection.pages.page import (
    HOW_TO_READ,
    Page,
    facts,
    figure_block,
    grid_block,
    heading,
    new_page,
    paragraph,
)
from moa_search.inspection.printing import to_html
from moa_search.inspection.quality import heaviest_heads, sample_advice

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
    more = [] if advice is None else [paragraph(f"More samples? {advice}")]
    page.add("Samples", *map(to_html, profile_tables(profile)), *more)
    page.add("Provenance", facts(profile_provenance(profile)))
    return page


def _influence_blocks(profile: Profile, lengths: Sequence[int], criterion: str) -> list[str]:
    blocks = []
    for length in lengths:
        losses, _, window = profile.influence(length, criterion=criterion)
        top = float(np.nanmax(losses))
        blocks += [
            heading(f"{length} tokens, a window of {window}"),
            grid_block(
                influence_colours(losses),
                influence_texts(losses),
                f"{criterion.capitalize()} loss when one head attends {window} of {length} tokens, the others all",
                colours="cividis",
                scale=(f"{top / 10**DECADES:.2g} or less", f"{top:.3g}", f"{criterion} loss, logarithmic"),
                native=bool(profile.header.native_layers),
            ),
        ]
    return blocks


def _curve_blocks(profile: Profile, lengths: Sequence[int], heads: list[tuple[int, int]], criterion: str) -> list[str]:
    blocks = []
    for length in lengths:
        shown = heads or heaviest_heads(profile, length, criterion, CURVES)
        draw = partial(draw_window_losses, profile=profile, length=length, heads=shown, criterion=criterion)
        alt = f"{criterion.capitalize()} loss of some heads over their window, at {length} tokens"
        blocks.append(figure_block(chart(draw), alt, table=curve_frame(profile, length, shown, criterion)))
    return blocks
