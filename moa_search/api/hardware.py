"""Speeds of the device at hand, for budgets on times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moa_search.api.common import require_writable
from moa_search.options import HardwareOptions, takes

if TYPE_CHECKING:
    from moa_search.search.budgets import Hardware


@takes(HardwareOptions)
def measure_hardware(output: str | None, options: HardwareOptions) -> Hardware:
    """Measure this device's memory bandwidth and matrix FLOP/s in seconds, for budgets on times.

    Args:
        output: YAML file to write, for --hardware of the other commands.
        options: As keywords, each described in `HardwareOptions`.

    Returns:
        The device's speeds and tiles.

    Raises:
        MoAError: The device isn't there, or the file can't be written; see `moa_search.errors`.
    """
    from moa_search.evaluation.device_speed import measure_speed
    from moa_search.modeling.loading import resolve_device

    require_writable(output)
    speeds = measure_speed(
        resolve_device(options.device), name=options.name, tile_query=options.tile_query, tile_key=options.tile_key
    )
    if output is not None:
        speeds.save(output)
    return speeds
