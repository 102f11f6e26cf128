"""The CPU kernels of one layer against the machine: GFLOP/s of its multiply-add units, and the rate of a copy.

    OMP_NUM_THREADS=1 python benchmarks/measure_cpu_kernels.py

Prefill: causal and dense, 9 heads on 3 KV heads of 64, as SmolLM2's. Decoding: one token over caches that together are
many times as large as the processor's caches, so that every one is cold. Minima of several runs, one thread's CPU time.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from moa_kernels.cpu.build import find_library
from moa_kernels.decode import span_decode
from moa_kernels.prefill import span_prefill
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, DIM = 9, 3, 64

PEAK = """
// Two per cycle of latency 4 or so want eight sums at least; in one block, so that all of them stay in registers.
#define SUM(code, n) code " %%zmm30, %%zmm31, %%zmm" #n "\\n"
#define SUMS(code) SUM(code, 0) SUM(code, 1) SUM(code, 2) SUM(code, 3) SUM(code, 4) SUM(code, 5) SUM(code, 6) \\
  SUM(code, 7) SUM(code, 8) SUM(code, 9) SUM(code, 10) SUM(code, 11) SUM(code, 12) SUM(code, 13) SUM(code, 14) \\
  SUM(code, 15)
#define RATE(name, code) extern "C" void name(long n) { \\
  asm volatile("vpxord %%zmm30, %%zmm30, %%zmm30\\n vpxord %%zmm31, %%zmm31, %%zmm31\\n" \\
    "1:\\n" SUMS(code) "dec %0\\n jnz 1b\\n" : "+r"(n) :: "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", \\
    "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm30", "zmm31"); }
RATE(floats, "vfmadd231ps")
RATE(pairs, "vdpbf16ps")
"""


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    find_library()
    peaks = multiply_add_rates()
    states = torch.randn(2**27 // 4)
    copied = torch.empty_like(states)
    copy = 2 * states.nbytes / fastest(lambda: copied.copy_(states), 5) / 1e9
    print(f"multiply-add {peaks}, copy {copy:.1f} GB/s (read and written)")
    for dtype in (torch.bfloat16, torch.float32):
        for length in (1024, 4096):
            print(dtype, length, prefill(dtype, length, peaks), decoding(dtype, length, copy), sep=" | ")


def multiply_add_rates() -> dict[str, float]:
    """GFLOP/s of registers alone."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "peak.cpp"
        source.write_text(PEAK)
        command = [
            "g++",
            "-O2",
            "-mavx512f",
            "-mavx512bf16",
            "-shared",
            "-fPIC",
            "-o",
            f"{folder}/peak.so",
            str(source),
        ]
        subprocess.run(command, check=True)
        peak = ctypes.CDLL(f"{folder}/peak.so")
        found = {}
        for name, flops in (("floats", 32), ("pairs", 64)):
            run = getattr(peak, name)
            run.argtypes, run.restype = [ctypes.c_long], None
            found[name] = round(16 * flops * 10**7 / fastest(lambda run=run: run(10**7), 5) / 1e9, 1)
    return found


def fastest(run: Callable[[], object], times: int) -> float:
    """Seconds of CPU time."""
    run()
    best = float("inf")
    for _ in range(times):
        start = time.thread_time()
        run()
        best = min(best, time.thread_time() - start)
    return best


def prefill(dtype: torch.dtype, length: int, peaks: dict[str, float]) -> str:
    query = torch.randn(1, HEADS, length, DIM).to(dtype)
    key, value = (torch.randn(1, KV_HEADS, length, DIM).to(dtype) for _ in range(2))
    dense = HeadSpans.dense(KV_HEADS)
    ours = fastest(lambda: span_prefill(query, key, value, dense, impl="cpu"), 5)
    theirs = fastest(lambda: scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), 3)
    flops = 2 * HEADS * DIM * length * (length + 1) / 1e9
    peak = peaks["pairs" if dtype == torch.bfloat16 else "floats"]
    return f"prefill {flops / ours:.0f} GFLOP/s, {flops / ours / peak:.0%} of the peak; SDPA {flops / theirs:.0f}"


def decoding(dtype: torch.dtype, length: int, copy: float) -> str:
    layout, lens = RingLayout((length,) * KV_HEADS, (0,) * KV_HEADS), torch.tensor([length])
    count = 2**28 // (2 * layout.slots * DIM * dtype.itemsize)
    caches = [[torch.randn(1, layout.slots, DIM).to(dtype) for _ in range(2)] for _ in range(count)]
    query, dense = torch.randn(1, HEADS, 1, DIM).to(dtype), HeadSpans.dense(KV_HEADS)

    def ours() -> None:
        for cache in caches:
            span_decode(query, *cache, lens, layout, dense, impl="cpu")

    def theirs() -> None:
        for keys, values in caches:
            key, value = (states.view(1, KV_HEADS, length, DIM) for states in (keys, values))
            scaled_dot_product_attention(query, key, value, enable_gqa=True)

    amount = count * 2 * layout.slots * DIM * dtype.itemsize / 1e9
    mine, sdpa = fastest(ours, 3), fastest(theirs, 2)
    return f"decoding {amount / mine:.1f} GB/s, {amount / mine / copy:.0%} of a copy; SDPA {amount / sdpa:.1f}"


if __name__ == "__main__":
    main()
