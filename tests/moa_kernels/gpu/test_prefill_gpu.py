"""Prefill compiled for the GPU at hand, with the launch settings that users get."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from moa_kernels.prefill import span_prefill
from moa_kernels.spans import HeadSpans

from ..yardstick import DEVICE, DTYPES, Batch, Masked, assert_within

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SPANS = HeadSpans.of([(0, 256), (0, 64), (300, 0), (-100, 128)], sink=16, min_span=48)


DIMS = (64, 80, 96, 128, 256)


def inputs(dim, dtype, queries=777, keys=1500, batch=2, heads=12, kv_heads=4):
    generator = torch.Generator(DEVICE).manual_seed(dim)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)

    query = randn(batch, queries, heads, dim).transpose(1, 2)
    return query, randn(batch, kv_heads, keys, dim), randn(batch, kv_heads, keys, dim)


def problem(dim, dtype, extras):
    """What `span_prefill` takes beside the rules, and the same by an explicit mask."""
    query, key, value = inputs(dim, dtype)
    starts, ends = torch.tensor([-300, 40], device=DEVICE), torch.tensor([1500, 1400], device=DEVICE)
    keys, start, end = key.shape[2], starts if extras else starts * 0, ends if extras else ends * 0 + 1500
    column = torch.arange(keys, device=DEVICE)
    row = keys - query.shape[2] + torch.arange(query.shape[2], device=DEVICE)
    visible = SPANS.visible(row - start[:, None], column - start[:, None]).transpose(0, 1)
    first, last = start.clamp(min=0)[:, None, None, None], end[:, None, None, None]
    visible = visible & (column >= first) & (column < last) & (row[:, None] >= first) & (row[:, None] < last)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(dim)).to(DEVICE)
    shared = {"softcap": 20.0, "sink_logits": logits} if extras else {}
    options = {"starts": starts, "ends": ends, **shared} if extras else {}
    return (query, key, value), options, Masked(query, key, value, visible, **shared)


BATCH = Batch(lambda: (problem(*which)[2] for which in product(DIMS, DTYPES, (False, True))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("extras", [False, True])
def test_close_to_float64(dim, dtype, extras):
    arguments, options, masked = problem(dim, dtype, extras)
    assert_within(span_prefill(*arguments, SPANS, impl="triton", **options), masked, BATCH, (dim, extras))


def test_two_runs_agree_to_the_bit_even_when_work_is_shared_out():
    query, key, value = inputs(128, torch.bfloat16, queries=64, keys=20_000, batch=1)
    runs = [span_prefill(query, key, value, SPANS, impl="triton") for _ in range(3)]
    for out, lse in runs[1:]:
        assert torch.equal(out, runs[0][0])
        assert torch.equal(lse, runs[0][1])


def test_more_elements_than_32_bits_can_count():
    """32 heads x 600,000 rows x 128: queries and outputs have 2.4e9 elements. The last rows are compared."""
    generator = torch.Generator("cuda").manual_seed(0)
    length, heads, sink, window = 600_000, 32, 16, 240
    query = torch.empty(1, heads, length, 128, device="cuda", dtype=torch.bfloat16).normal_(generator=generator)
    key, value = torch.empty(2, 1, 8, length, 128, device="cuda", dtype=torch.bfloat16).normal_(generator=generator)
    spans = HeadSpans.of([(sink + window, 0)] * 8, sink=sink, min_span=sink + 32)
    out, _ = span_prefill(query, key, value, spans, impl="triton")
    rows = 64
    near = torch.cat([torch.arange(sink), torch.arange(length - rows - window, length)]).cuda()
    near_key, near_value = (x[:, :, near].double().repeat_interleave(4, 1) for x in (key, value))
    row = torch.arange(length - rows, length, device="cuda")
    kept = (near <= row[:, None]) & ((near < sink) | (near > row[:, None] - window))
    scores = query[:, :, -rows:].double() @ near_key.mT * 128**-0.5
    exact = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ near_value
    torch.testing.assert_close(out[:, :, -rows:].double(), exact, rtol=2e-2, atol=2e-2)
