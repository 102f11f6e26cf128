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
    """`Plan.plot_spans` at several lengths, one below the other.

    Args:
        plan: The plan.
        lengths: Context lengths in tokens.
    """
    from matplotlib.figure import Figure

    model = plan.model
    width, height = max(5.0, 0.27 * model.num_hidden_layers + 1.8), max(1.6, 0.32 * model.num_key_value_heads + 1.1)
    figure = Figure(figsize=(width, height * len(lengths) + 0.3), layout="constrained")
    for axes, length in zip(figure.subplots(len(lengths), 1, squeeze=False)[:, 0], lengths, strict=True):
        plan.plot_spans(length, ax=axes)
    return figure


def save_heat_map(plan: Plan, path: str | os.PathLike[str], *, lengths: Sequence[int]) -> None:
    """Write `plot_spans` as PNG, atomically."""
    with atomic_write(path) as file:
        plot_spans(plan, lengths).savefig(file, format="png", dpi=130)
