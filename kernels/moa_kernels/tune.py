"""Find the fastest launch settings on the GPU at hand and remember them.

Usage: python -m moa_kernels.tune [--kernels prefill decode influence coded_influence] [--head-dims 64 128]
    [--length 16384]

Settings go to the file that `moa_kernels.launch` reads (``$MOA_KERNELS_CACHE``, else ``~/.cache/moa-search``), one per
device name. Settings that don't compile or need more shared memory than there is are passed over.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from moa_kernels.coded_influence import coded_changes
from moa_kernels.decode import span_decode
from moa_kernels.influence import influence_statistics
from moa_kernels.launch import LaunchConfig, cache_file, overridden, save_tuned
from moa_kernels.prefill import span_prefill
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans

CANDIDATES: dict[str, list[tuple[Any, ...]]] = {
    "prefill": list(itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))),
    "decode": list(itertools.product((32,), (32, 64, 128), (2, 4, 8), (2, 3, 4))),
    "influence": list(itertools.product((64, 128), (32, 64), (4, 8), (2, 3), (None, 128))),
    "coded_influence": list(itertools.product((64, 128), (32, 64), (4, 8), (2, 3), (None, 128))),
}
"""block_m, block_n, num_warps, num_stages, and where it matters max_registers."""

HEADS, KV_HEADS, SINK = 32, 8, 64
"""Of Llama-3-8B, one of whose layers is timed."""

SPANS = HeadSpans.of([(0, beta) for beta in (256, 128, 64, 32, 8, 8, 8, 8)], sink=SINK, min_span=SINK + 64)
"""A plan of 25 %, heads as unlike as searches find them."""


def measure(run: Callable[[], Any], device: torch.device, milliseconds: int = 200) -> float:
    """Median time of one call in milliseconds, with a cold L2 cache; on a GPU without the host's share."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    from triton.testing import do_bench

    return float(do_bench(_captured(run), warmup=milliseconds // 4, rep=milliseconds, return_mode="median"))


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph: launches of several kernels would otherwise be timed with the host's gaps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def task(kernel: str, dim: int, length: int, device: torch.device) -> Callable[[], Any]:
    """What is timed."""
    randn = partial(torch.randn, device=device, dtype=torch.bfloat16)
    if kernel == "decode":  # four samples whose rings are full
        layout = RingLayout((length,) * KV_HEADS, (SINK,) * KV_HEADS)
        spans = HeadSpans(((SINK, length, 0, 0),) * KV_HEADS)
        keys, values = randn(4, layout.slots, dim), randn(4, layout.slots, dim)
        lens = torch.full((4,), length, device=device)
        return partial(span_decode, randn(4, HEADS, 1, dim), keys, values, lens, layout, spans, impl="triton")
    query, key, value = (randn(heads, length, dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    if kernel == "prefill":
        return partial(span_prefill, query[None], key[None], value[None], SPANS, impl="triton")
    if kernel == "coded_influence":  # as profiles ask for tiers 16 8 4 2
        keys, values = (randn(4, KV_HEADS, length, dim) for _ in range(2))
        return partial(
            coded_changes, query, keys, values, randn(HEADS, length, dim), windows=[length], row_buckets=1,
            bucket_rows=length, sink=SINK, scale=dim**-0.5, impl="triton",
        )  # fmt: skip
    windows = [window for window in (*range(64, 1025, 64), 2048, 4096) if window < length]
    return partial(
        influence_statistics, query, key, value, randn(HEADS, length, dim), windows=[*windows, length],
        row_buckets=32, bucket_rows=-(-length // 32), sink=SINK, scale=dim**-0.5, impl="triton",
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune and remember."""
    parser = argparse.ArgumentParser(
        "python -m moa_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--length", type=int, default=16384)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to tune for")
    device = torch.device("cuda")
    for kernel, dim in itertools.product(options.kernels, options.head_dims):
        found = sorted(timed(kernel, task(kernel, dim, options.length, device), device), key=lambda pair: pair[0])
        for ms, config in found[:3]:
            print(f"{kernel} {dim}: {ms:.3f} ms with {config}", flush=True)
        if not found:
            parser.error(f"{kernel} runs with none of its settings at head_dim {dim}; the reasons are above")
        save_tuned(device, kernel, dim, 2, found[0][1])
    print(f"remembered in {cache_file(device)}")


if __name__ == "__main__":
    main()
