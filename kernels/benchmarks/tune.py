"""Find the fastest launch settings on the GPU at hand and remember them.

Usage: python kernels/benchmarks/tune.py [--kernels prefill decode influence] [--head-dims 64 128] [--length 16384]

Settings go to the file that `moa_kernels.launch` reads (``$MOA_KERNELS_CACHE``, else ``~/.cache/moa-search``), one per
device name. Settings that don't compile or need more shared memory than there is are passed over.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import torch  # noqa: E402
from moa_kernels.decode import span_decode  # noqa: E402
from moa_kernels.influence import influence_statistics  # noqa: E402
from moa_kernels.launch import LaunchConfig, cache_file, overridden, save_tuned  # noqa: E402
from moa_kernels.prefill import span_prefill  # noqa: E402
from moa_kernels.rings import RingLayout  # noqa: E402
from moa_kernels.spans import HeadSpans  # noqa: E402
from plans import spans_of  # noqa: E402
from timing import measure  # noqa: E402

CANDIDATES = {
    "prefill": list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))),
    "decode": list(itertools.product((32,), (32, 64, 128), (2, 4, 8), (2, 3, 4))),
    "influence": list(itertools.product((64, 128), (32, 64), (4, 8), (2, 3), (None, 128))),
}
"""block_m, block_n, num_warps, num_stages, and where it matters max_registers."""

HEADS, KV_HEADS = 32, 8


def task(kernel: str, dim: int, length: int, device: torch.device) -> Callable[[], Any]:
    """What is timed: one layer of Llama-3-8B's heads."""
    randn = partial(torch.randn, device=device, dtype=torch.bfloat16)
    query, key, value = randn(1, HEADS, length, dim), randn(1, KV_HEADS, length, dim), randn(1, KV_HEADS, length, dim)
    if kernel == "prefill":
        return partial(span_prefill, query, key, value, spans_of("25 %"), impl="triton")
    if kernel == "decode":
        layout = RingLayout((length,) * KV_HEADS, (64,) * KV_HEADS)
        spans = HeadSpans(((64, length, 0, 0),) * KV_HEADS)
        keys, values = randn(4, layout.slots, dim), randn(4, layout.slots, dim)
        lens = torch.full((4,), length, device=device)
        return partial(span_decode, randn(4, HEADS, 1, dim), keys, values, lens, layout, spans, impl="triton")
    grad = randn(HEADS, length, dim)
    return partial(
        influence_statistics, query[0], key[0], value[0], grad, windows=[*range(64, 1025, 64), 2048, 4096, length],
        row_buckets=32, bucket_rows=-(-length // 32), sink=64, scale=dim**-0.5, impl="triton",
    )  # fmt: skip


def timed(kernel: str, run: Callable[[], Any], device: torch.device) -> Iterator[tuple[float, LaunchConfig]]:
    """Milliseconds of every setting that works."""
    for numbers in CANDIDATES[kernel]:
        config = LaunchConfig(*numbers)
        with overridden(kernel, config):
            try:
                yield measure(run, device), config
            except Exception as error:  # a compiler has many ways to refuse
                print(f"  {config}: {type(error).__name__}", flush=True)


def main() -> None:
    """Tune and remember."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--length", type=int, default=16384)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to tune for")
    device = torch.device("cuda")
    for kernel, dim in itertools.product(options.kernels, options.head_dims):
        found = sorted(timed(kernel, task(kernel, dim, options.length, device), device), key=lambda pair: pair[0])
        for ms, config in found[:3]:
            print(f"{kernel} {dim}: {ms:.3f} ms with {config}", flush=True)
        save_tuned(device, kernel, dim, 2, found[0][1])
    print(f"remembered in {cache_file(device)}")


if __name__ == "__main__":
    main()
