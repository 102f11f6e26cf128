"""The yardstick itself: plain torch passes it in every case, small mistakes pass it in none of the default ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .seeds import DEFAULT_SEEDS
from .test_decode import BATCH as DECODE
from .test_decode import Case
from .test_prefill import BATCH as PREFILL
from .test_prefill import make
from .yardstick import DTYPES, Masked, assert_within


def drawn(seed: int, kernel: str) -> Masked:
    return make(seed)[0].masked() if kernel == "prefill" else Case.drawn(seed, DTYPES[seed % 3]).masked()


def solved(problem: Masked) -> tuple[torch.Tensor, torch.Tensor]:
    """As a kernel would: the log-sum-exp in float32."""
    return problem.plainly(problem.query.dtype)[0].to(problem.query.dtype), problem.plainly(torch.float32)[1]


def a_key_too_few(problem: Masked) -> Masked:
    oldest = problem.visible & (problem.visible.cumsum(-1) == 1)
    alone = problem.visible.sum(-1, keepdim=True) == 1
    return replace(problem, visible=problem.visible & (alone | ~oldest))


MISTAKES = {
    "scale": lambda p: replace(p, scale=1.001 * (p.query.shape[-1] ** -0.5 if p.scale is None else p.scale)),
    "key": a_key_too_few,
    "soft cap": lambda p: replace(p, softcap=p.softcap and p.softcap * 1.001),
    "sink logits": lambda p: replace(p, sink_logits=None if p.sink_logits is None else p.sink_logits.roll(1)),
    "no sink logits": lambda p: replace(p, sink_logits=None),
}


@pytest.mark.parametrize(("kernel", "batch"), [("prefill", PREFILL), ("decode", DECODE)])
def test_plain_torch_passes_on_seeds_that_the_yardstick_never_saw(kernel, batch):
    for seed in range(DEFAULT_SEEDS, DEFAULT_SEEDS + 30):
        problem = drawn(seed, kernel)
        assert_within(solved(problem), problem, batch, seed)


@pytest.mark.parametrize(("kernel", "batch"), [("prefill", PREFILL), ("decode", DECODE)])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught_by_the_default_seeds(kernel, batch, mistake):
    caught = []
    for seed in range(DEFAULT_SEEDS):
        problem = drawn(seed, kernel)
        if problem.query.dtype != torch.float32 and mistake in ("scale", "soft cap"):
            continue  # within the rounding of 16 bits
        wrong = MISTAKES[mistake](problem)
        try:
            assert_within(solved(wrong), problem, batch, seed)
        except AssertionError:
            caught.append(seed)
    assert caught
