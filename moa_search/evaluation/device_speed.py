"""What the cost model of time budgets needs of a device, measured on the device at hand."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch

from moa_search.errors import ConfigError
from moa_search.search.budgets import Hardware

COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}
MATRIX_WIDTH = {"cuda": 8192, "cpu": 512}
REPEATS = 20
SECONDS = 3.0
"""No repeat begins after that, so that a slow CPU ends soon, too."""


def measure_speed(device: str, *, name: str | None = None, tile_query: int = 128, tile_key: int = 128) -> Hardware:
    """Bandwidth of copying a large buffer, and FLOP/s of multiplying two large bfloat16 matrices.

    Each is the fastest of several repeats after one that warms up.

    Args:
        device: Such as ``cpu`` or ``cuda:0``.
        name: What plans and tables call the device; by default its own name.
        tile_query: Not measured: rows of queries that the attention kernel handles together.
        tile_key: Not measured: keys that it reads together.

    Raises:
        ConfigError: The device is neither a CPU nor a CUDA GPU.
    """
    place = torch.device(device)
    if place.type not in COPY_BYTES:
        raise ConfigError(f"device {device!r}: only a CPU or a CUDA GPU can be measured")
    found = torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU ({platform.machine()})"
    return Hardware(
        name=name or found,
        bandwidth_bytes_per_s=_copy_bandwidth(place),
        flops_per_s=_matmul_flops(place),
        tile_query=tile_query,
        tile_key=tile_key,
    )


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, each read once and written once."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)


def _matmul_flops(device: torch.device) -> float:
    """Bfloat16 FLOP per second; of random numbers, since a GPU multiplies zeros faster."""
    width = MATRIX_WIDTH[device.type]
    left, right = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    return 2 * width**3 / _fastest(lambda: left @ right, device)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest repeat."""
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 2 or (len(seconds) <= REPEATS and time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
