"""What a profile shows of itself: a frame and a picture. They are methods of ``Profile``.

A profile has no spans, masks or density: those are a plan's, which a search makes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moa_search.errors import ConfigError
from moa_search.formats.criteria import CRITERIA, window_losses

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.axes import Axes

    from moa_search.formats.profile import Profile

DECADES = 3
"""Powers of ten that the colours of influences span; what is smaller has the last colour."""


def to_frame(profile: Profile, criteria: str | Sequence[str] = CRITERIA) -> pd.DataFrame:
    """What each window costs, as a tidy frame: one row per length, layer, KV head and window.

    Args:
        profile: The profile.
        criteria: Some of `moa_search.formats.criteria.CRITERIA`, or one.

    Returns:
        Columns ``length``, ``layer``, ``kv_head`` and ``window`` (tokens beside the sink, the query included), and
        for each criterion its loss when every query of the head attends that window, and the ``..._error``, the
        standard error over samples. Native layers, which aren't measured, are left out.

    Raises:
        ConfigError: An unknown criterion.
    """
    import pandas as pd

    frames = []
    layers, heads = profile.header.searchable_layers, profile.header.model.num_key_value_heads
    for length in profile.lengths:
        entry = profile.by_length[length]
        index = pd.MultiIndex.from_product(
            [[length], layers, range(heads), entry.header.windows], names=["length", "layer", "kv_head", "window"]
        )
        columns = {}
        for criterion in [criteria] if isinstance(criteria, str) else criteria:
            mean, error = window_losses(entry, criterion)
            columns[criterion] = mean[layers].ravel()
            columns[f"{criterion}_error"] = error[layers].ravel()
        frames.append(pd.DataFrame(columns, index=index).reset_index())
    return pd.concat(frames, ignore_index=True)


def plot_influence(
    profile: Profile,
    length: int | None = None,
    *,
    window: int | None = None,
    criterion: str = "signed",
    ax: Axes | None = None,
) -> Axes:
    """Heat map of what it costs to let the queries of one KV head attend a window only.

    Args:
        profile: The profile.
        length: A profiled length in tokens; by default the longest.
        window: Tokens beside the sink, the query included; the nearest that was measured is taken. By default an
            eighth of the length.
        criterion: How effects on the loss are summed up.
        ax: Axes to draw on.

    Raises:
        ConfigError: The length wasn't profiled, the window isn't within it, or an unknown criterion.
    """
    from moa_search.pictures import draw_cells

    losses, at, nearest = influence(profile, length, window=window, criterion=criterion)
    top = float(np.nanmax(losses)) or 1.0
    return draw_cells(
        losses,
        ax,
        title=f"{at} tokens: {criterion} loss of a window of {nearest}",
        label=f"{criterion} loss",
        limits=(top / 10**DECADES, top),
        colours="cividis",
        logarithmic=True,
        xlabel="layer (grey: own window)" if profile.header.native_layers else "layer",
    )


def influence(
    profile: Profile, length: int | None = None, *, window: int | None = None, criterion: str = "signed"
) -> tuple[npt.NDArray[np.float64], int, int]:
    """What `plot_influence` draws.

    Returns:
        Losses ``[layer, kv_head]``, NaN in native layers; the length; the window that was measured.

    Raises:
        ConfigError: The length wasn't profiled, the window isn't within it, or an unknown criterion.
    """
    at = max(profile.lengths) if length is None else length
    if at not in profile.by_length:
        known = ", ".join(map(str, profile.lengths))
        raise ConfigError(f"length {at} wasn't profiled; choose from {known}")
    entry = profile.by_length[at]
    wanted = max(1, at // 8) if window is None else window
    if not 1 <= wanted <= at:
        raise ConfigError(f"window {wanted} is out of range; it must be 1 to {at} tokens")
    index = int(np.abs(np.array(entry.header.windows) - wanted).argmin())
    losses = window_losses(entry, criterion)[0][..., index]
    losses[list(profile.header.native_layers)] = np.nan
    return losses, at, entry.header.windows[index]


def to_html(profile: Profile) -> str:
    """A small heat map with every head's influence under the mouse, and what was measured."""
    from moa_search.pictures import cell_grid, notebook_html

    header = profile.header
    losses, at, window = influence(profile)
    grid = cell_grid(
        influence_colours(losses),
        influence_texts(losses),
        label=f"Signed loss of a window of {window} at {at} tokens by layer and KV head",
        focusable=False,
    )
    rows = [
        [n, entry.header.samples, len(entry.header.windows), f"{entry.loss.mean():.3f}"]
        for n, entry in sorted(profile.by_length.items())
    ]
    about = (
        f"of {header.model_name} ({header.model.architecture}, {header.model.num_hidden_layers} layers of "
        f"{header.model.num_key_value_heads} KV heads); colours: signed loss of a window of {window} at {at} tokens, "
        "logarithmic"
    )
    return notebook_html("Profile", about, grid, ["tokens", "samples", "windows", "loss"], rows)


def influence_colours(losses: npt.NDArray[np.float64]) -> list[list[str]]:
    """Colours of `influence`'s losses on a logarithmic scale of `DECADES`."""
    from moa_search.pictures import hex_colours

    top = float(np.nanmax(losses)) or 1.0
    powers = np.log10(np.maximum(losses, top * 10.0**-DECADES) / top)
    return hex_colours(powers, low=-DECADES, high=0, colours="cividis")


def influence_texts(losses: npt.NDArray[np.float64]) -> list[list[str]]:
    """Of each layer and KV head what it loses, in words."""
    return [
        [
            f"layer {layer}, KV head {head}: " + ("own window, not measured" if np.isnan(loss) else f"{loss:.3g}")
            for head, loss in enumerate(row)
        ]
        for layer, row in enumerate(losses)
    ]
