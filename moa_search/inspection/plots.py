"""Plans as pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moa_search.formats import Plan
from moa_search.formats.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_spans", "save_heat_map"]


def plot_spans(plan: Plan, lengths: Sequence[int]) -> Figure:
    """Heat maps of the share of the context that each layer and KV head keeps, one per length.

    Native layers are grey: they keep the model's own window whatever the plan says.

    Args:
        plan: The plan.
        lengths: Context lengths in tokens.
    """
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    native = list(plan.native_layers)
    colours = colormaps["viridis"].with_extremes(bad="lightgrey")
    layers, heads = plan.model.num_hidden_layers, plan.model.num_key_value_heads
    width, height = max(5.0, 0.27 * layers + 1.8), max(1.6, 0.32 * heads + 1.1)
    figure = Figure(figsize=(width, height * len(lengths) + 0.3), layout="constrained")
    for axes, length in zip(figure.subplots(len(lengths), 1, squeeze=False)[:, 0], lengths, strict=True):
        kept = np.ma.array(np.array(plan.spans(length)).T / length)
        kept[:, native] = np.ma.masked
        image = axes.imshow(kept, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_title(f"{length} tokens: {plan.density(length):.1%} of the KV cache kept", loc="left", fontsize=10)
        axes.set_ylabel("KV head")
        axes.set_xticks(range(0, layers, max(1, layers // 15)))
        axes.set_yticks(range(0, heads, max(1, heads // 8)))
        figure.colorbar(image, ax=axes, label="span / n", pad=0.01)
    axes.set_xlabel(f"layer (grey: own window, {plan.native_window})" if native else "layer")
    return figure


def save_heat_map(plan: Plan, path: str | os.PathLike[str], *, lengths: Sequence[int]) -> None:
    """Write `plot_spans` as PNG, atomically."""
    with atomic_write(path) as file:
        plot_spans(plan, lengths).savefig(file, format="png", dpi=130)
