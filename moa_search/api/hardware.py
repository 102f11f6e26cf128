"""Speeds of the device at hand, for budgets on times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_search.api.common import require_positive, require_writable

if TYPE_CHECKING:
    from moa_search.search.budgets import Hardware

__all__ = ["measure_hardware"]


def measure_hardware(
    output: str | None = None,
    *,
    name: str | None = None,
    device: str = "auto",
    tile_query: int = 128,
    tile_key: int = 128,
) -> Hardware:
    """Measure this device's memory bandwidth and matrix FLOP/s in seconds, for budgets on times.

    Args:
        output: YAML file to write, for --hardware of the other commands.
        name: What plans and tables call the device; by default its own name.
        device: Such as cpu or cuda:0; auto takes the first GPU if there is one.
        tile_query: Rows of queries that the attention kernel handles together; not measured.
        tile_key: Keys that the attention kernel reads together; not measured.

    Returns:
        The device's speeds and tiles.

    Raises:
        MoAError: The device isn't there, or the file can't be written; see `moa_search.errors`.
    """
    from moa_search.evaluation.device_speed import measure_speed
    from moa_search.modeling.loading import resolve_device

    require_positive(tile_query=tile_query, tile_key=tile_key)
    require_writable(output)
    speeds = measure_speed(resolve_device(device), name=name, tile_query=tile_query, tile_key=tile_key)
    if output is not None:
        speeds.save(output)
    return speeds
