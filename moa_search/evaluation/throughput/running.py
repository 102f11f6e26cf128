"""One timed run of `generate`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from moa_search.evaluation.throughput.memory import PeakMemory
from moa_search.evaluation.throughput.ways import Way, cache_bytes
from moa_search.modeling.private import cache_name

UNTIMED_STEPS = 4
"""Decoding steps before the timed ones: in them, compiled code records CUDA graphs for the cache of this run."""


@dataclass(frozen=True)
class Run:
    """What one run took.

    Attributes:
        prefill_ms: From the start of the prefill until the first new token is known to the host.
        decode_ms: Mean time of a decoding step, the cache's growing included.
        decode_tokens_per_s: New tokens of all samples per second of decoding.
        cache_bytes: Allocated for keys and values at the end.
        peak_bytes: As `PeakMemory`; None where it isn't known.
    """

    prefill_ms: float
    decode_ms: float
    decode_tokens_per_s: float
    cache_bytes: int
    peak_bytes: int | None


def run_once(model: Any, way: Way, ids: torch.Tensor, decode_tokens: int, *, compiled: bool = True) -> Run:
    """Prefill a batch and decode, through `generate` as users do, inside `ways.generating_on`.

    Args:
        model: The dense model; put under the way's plan for this run.
        way: How to run it.
        ids: Prompts ``[batch, length]``.
        decode_tokens: Timed decoding steps, after the first token, which is the prefill's, and `UNTIMED_STEPS`.
        compiled: Whether a compiled way is really compiled; its memory can be probed without.

    Raises:
        torch.OutOfMemoryError: It doesn't fit.
    """
    clock = _Clock()
    batch, length = ids.shape
    new_tokens = 1 + UNTIMED_STEPS + decode_tokens
    with way.on(model, length), PeakMemory(model.device) as memory:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            **{cache_name(): way.cache(model, length, length + new_tokens)},
            return_dict_in_generate=True,
            disable_compile=not (way.is_compiled and compiled),
            streamer=clock,
        )
        stored = cache_bytes(out[cache_name()])
    assert len(clock.times) == 1 + new_tokens
    start, first, *steps = clock.times
    decode_s = steps[-1] - steps[UNTIMED_STEPS - 1]
    return Run(
        prefill_ms=(first - start) * 1e3,
        decode_ms=decode_s / decode_tokens * 1e3,
        decode_tokens_per_s=batch * decode_tokens / decode_s,
        cache_bytes=stored,
        peak_bytes=memory.peak_bytes,
    )


class _Clock:
    """A streamer that notes when it gets the prompt and every new token; each has then reached the host."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
