"""Plans and profiles as picture files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moa_search.formats import Plan, Profile
from moa_search.formats.files import atomic_write
from moa_search.pictures import cells_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_spans", "save_diff_map", "save_figure", "save_heat_map", "save_influence_map"]


def plot_spans(plan: Plan, lengths: Sequence[int]) -> Figure:
    """`Plan.plot_spans` at several lengths, one below the other.

    Args:
        plan: The plan.
        lengths: Context lengths in tokens.
    """
    from matplotlib.figure import Figure

    width, height = cells_size(plan.model.num_hidden_layers, plan.model.num_key_value_heads)
    figure = Figure(figsize=(width, height * len(lengths) + 0.3), layout="constrained")
    for axes, length in zip(figure.subplots(len(lengths), 1, squeeze=False)[:, 0], lengths, strict=True):
        plan.plot_spans(length, ax=axes)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)


def save_heat_map(plan: Plan, path: str | os.PathLike[str], *, lengths: Sequence[int]) -> None:
    """Write `plot_spans` as PNG, atomically."""
    save_figure(plot_spans(plan, lengths), path)


def save_diff_map(plans: Sequence[Plan], path: str | os.PathLike[str], *, length: int) -> None:
    """Write `Plan.plot_diff` of two plans as PNG, atomically."""
    save_figure(_one_map(plans[0], lambda ax: plans[0].plot_diff(plans[1], length, ax=ax)), path)


def save_influence_map(profile: Profile, path: str | os.PathLike[str], *, length: int, criterion: str) -> None:
    """Write `Profile.plot_influence` as PNG, atomically."""
    save_figure(_one_map(profile.header, lambda ax: profile.plot_influence(length, criterion=criterion, ax=ax)), path)


def _one_map(of: Any, draw: Callable[[Axes], Any]) -> Figure:
    """A figure for one heat map; ``of`` has the model."""
    from matplotlib.figure import Figure

    width, height = cells_size(of.model.num_hidden_layers, of.model.num_key_value_heads)
    figure = Figure(figsize=(width, height + 0.3), layout="constrained")
    draw(figure.subplots())
    return figure
