"""Memory and time of profiling the demo model, beside a plain backward pass and beside MoA's own way.

Usage: python benchmarks/measure_profiling.py [LENGTH ...]

Every case runs in a process of its own: one sample to warm up, then the same sample again and again. Memory is
the rise of the peak resident set over the loaded model. The cases:

* plain: forward and backward of the same sample through torch's fused attention, no statistics;
* ours: a profiled sample; "checkpointed" recomputes each layer, as does its plain counterpart;
* MoA: its profiler reconstructed: attention matrices and their gradients are kept for every layer of a forward
  and backward pass without checkpointing, then each layer's |A (dA - sum A dA) / (1 - A)| is averaged over
  64 x 64 blocks (its profile step). Keys and values are expanded to all query heads, as there.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

from moa_search import load_model
from moa_search.data import Sample
from moa_search.profiling import profile_samples
from moa_search.profiling.checkpointing import checkpointed
from moa_search.profiling.measure import answer_loss
from moa_search.tasks import build_samples

LENGTHS = (1024, 2048, 4096, 8192)
CASES = ("plain", "ours", "plain checkpointed", "ours checkpointed", "MoA")
BLOCK = 64
REPEATS = 3
MEMORY_LIMIT_GIB = 18
"""A case that is known to need more isn't run."""


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process; Linux only."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def plain(model, sample: Sample, checkpointing: bool) -> None:
    with checkpointed(model, checkpointing):
        answer_loss(model, sample).backward()


def moa(model, sample: Sample) -> None:
    kept = []

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
        n = query.shape[2]
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (query @ key.mT * scaling).masked_fill(hidden, float("-inf"))
        attention = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        attention.retain_grad()
        kept.append(attention)
        return (attention @ value).transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("moa_way", attend)
    AttentionMaskInterface.register("moa_way", lambda *args, **kwargs: None)
    model.set_attn_implementation("moa_way")
    answer_loss(model, sample).backward()
    for layer, attention in enumerate(kept):
        a, g = attention.detach()[0], attention.grad[0]
        effect = (a * (g - (a * g).sum(-1, keepdim=True)) / (1 - a).clamp_min(1e-6)).abs()
        torch.nn.functional.avg_pool2d(effect.float(), BLOCK, ceil_mode=True)
        kept[layer] = None
    model.set_attn_implementation("sdpa")


def measure(case: str, length: int) -> None:
    logging.disable_progress_bar()
    model, tokenizer = load_model("demo", dtype="bfloat16")
    sample = build_samples(tokenizer, length=length, count=1, seed=0, split="calibration")[0]
    small = build_samples(tokenizer, length=256, count=1, seed=0, split="calibration")[0]
    checkpointing = "checkpointed" in case

    def once(which: Sample) -> None:
        if case.startswith("plain"):
            plain(model, which, checkpointing)
        elif case.startswith("ours"):
            profile_samples(model, [which], checkpointing=checkpointing)
        else:
            moa(model, which)

    once(small)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading doesn't count
    before = memory_mib("VmRSS")
    times = []
    for _ in range(REPEATS if length < 4096 else 1):
        began = time.perf_counter()
        once(sample)
        times.append(time.perf_counter() - began)
    print(memory_mib("VmHWM") - before, np.median(times))


def fit(lengths: list[int], memory: list[float]) -> str:
    slope, offset = np.polyfit(lengths, memory, 1)
    rest = np.array(memory) - (slope * np.array(lengths) + offset)
    r2 = 1 - (rest**2).sum() / ((memory - np.mean(memory)) ** 2).sum()
    return f"{slope * 1024:.0f} MiB per 1k tokens {offset:+.0f} MiB, R2 = {r2:.4f}"


def main() -> None:
    if "--measure" in sys.argv:
        measure(sys.argv[2], int(sys.argv[3]))
        return
    lengths = [int(text) for text in sys.argv[1:]] or list(LENGTHS)
    memory = {case: {} for case in CASES}
    seconds = {case: {} for case in CASES}
    for length in lengths:  # the cases of one length right after each other, so that a noisy machine is as noisy to all
        for case in CASES:
            known = memory["MoA"]
            if case == "MoA" and known and max(known.values()) * (length / max(known)) ** 2 > MEMORY_LIMIT_GIB * 1024:
                continue
            command = [sys.executable, __file__, "--measure", case, str(length)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            memory[case][length], seconds[case][length] = map(float, done.stdout.split()[-2:])
            print(f"{length} {case}: {memory[case][length]:.0f} MiB, {seconds[case][length]:.2f} s", flush=True)
    print(f"\n| length | {' | '.join(f'{case} MiB' for case in CASES)} | MoA / ours | time ours / plain ", end="")
    print("| checkpointed: ours / plain | time MoA / ours |")
    print(f"|---|{'---|' * (len(CASES) + 4)}")
    for length in lengths:
        cells = [f"{memory[case][length]:.0f}" if length in memory[case] else "" for case in CASES]
        known = length in memory["MoA"]
        ratios = [
            f"{memory['MoA'][length] / memory['ours'][length]:.1f}" if known else "",
            f"{seconds['ours'][length] / seconds['plain'][length]:.2f}",
            f"{seconds['ours checkpointed'][length] / seconds['plain checkpointed'][length]:.2f}",
            f"{seconds['MoA'][length] / seconds['ours'][length]:.2f}" if known else "",
        ]
        print(f"| {length} | {' | '.join(cells + ratios)} |")
    for case in CASES[:-1]:
        print(f"\n{case}: {fit(lengths, [memory[case][length] for length in lengths])}", end="")
    print()


if __name__ == "__main__":
    main()
