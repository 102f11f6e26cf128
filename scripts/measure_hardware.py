"""Measures what the cost model of time budgets needs of the device at hand, and writes it for --hardware.

Usage: python scripts/measure_hardware.py [--output hardware.yaml] [--name NAME] [--tile-query 128] [--tile-key 128]

Bandwidth is that of copying a large buffer (each byte is read once and written once), FLOP/s those of multiplying two
large bfloat16 matrices: the fastest of several repeats, each in a few seconds at most, on a GPU if there is one and
else on the CPU. Tiles aren't measured: give those of the attention kernel that will run.
"""

import argparse
import platform
import time
from pathlib import Path

import torch

from moa_search.search.budgets.hardware import Hardware

COPY_BYTES = {"cuda": 2**31, "cpu": 2**27}
MATRIX_WIDTH = {"cuda": 8192, "cpu": 512}
REPEATS = 20
SECONDS = 3.0
"""No further repeat begins after that, so that a slow CPU ends soon, too."""


def fastest(work, device: str) -> float:
    """Seconds of the fastest repeat, after one to warm up."""
    seconds = []
    began = time.perf_counter()
    while len(seconds) < 2 or (len(seconds) <= REPEATS and time.perf_counter() - began < SECONDS):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def matmul_flops(device: str) -> float:
    """Bfloat16 FLOP per second; multiplying random numbers, for a GPU multiplies zeros faster."""
    width = MATRIX_WIDTH[device]
    left, right = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    return 2 * width**3 / fastest(lambda: left @ right, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("hardware.yaml"))
    parser.add_argument("--name", help="what plans and tables call the device")
    parser.add_argument("--tile-query", type=int, default=128)
    parser.add_argument("--tile-key", type=int, default=128)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})"
    hardware = Hardware(
        name=options.name or name,
        bandwidth_bytes_per_s=copy_bandwidth(device),
        flops_per_s=matmul_flops(device),
        tile_query=options.tile_query,
        tile_key=options.tile_key,
    )
    hardware.save(options.output)
    print(
        f"{hardware.name}: {hardware.bandwidth_bytes_per_s / 1e9:.4g} GB/s, {hardware.flops_per_s / 1e12:.4g} TFLOP/s"
        f" (torch {torch.__version__}); written to {options.output}"
    )


if __name__ == "__main__":
    main()
