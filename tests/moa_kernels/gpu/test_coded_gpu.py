"""Decoding over codes on a real device, under CUDA graphs too."""

from __future__ import annotations

import pytest
import torch
from moa_kernels.coded import append_codes, decode_codes

from ..codes_by_hand import CodedCase
from ..rings_by_hand import poisoned_empty
from ..yardstick import DEVICE, Batch, assert_within

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = (torch.float16, torch.bfloat16)


def drawn(seed: int) -> CodedCase:
    return CodedCase.drawn(seed, DTYPES[seed % 2], longest=400, widths=(64, 80, 96, 128, 256))


BATCH = Batch(lambda: (drawn(seed).masked() for seed in range(40)))


@pytest.mark.parametrize("seed", range(60))
def test_random_layers_equal_float64(seed, monkeypatch):
    case = drawn(seed)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    output, lse = decode_codes(*case.arguments, **case.options, impl="triton")
    monkeypatch.undo()
    masked = case.masked()
    assert_within((output, masked.exactly().lse.float()), masked, BATCH, seed)
    expected = decode_codes(*case.arguments, **case.options, impl="torch")[1]
    torch.testing.assert_close(lse, expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("seed", range(4))
def test_graph_replay_equals_eager_while_tokens_come(seed):
    case = next(case for case in (drawn(1000 * seed + k) for k in range(1000)) if case.query.shape[2] == 1)
    query, stored, _, layout, turns, spans = case.arguments
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, width = len(case.lens), len(layout.key_bits), layout.width
    lens = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    graph, replayed = torch.cuda.CUDAGraph(), None
    for step in range(min(layout.rings.capacities)):
        new = [torch.randn(batch, kv_heads, 1, width, generator=generator).to(query) for _ in range(2)]
        append_codes(*new, stored, lens, layout, turns)
        lens += 1
        expected = decode_codes(query, stored, lens, layout, turns, spans, impl="triton")
        if replayed is None:
            with torch.cuda.graph(graph):
                replayed = decode_codes(query, stored, lens, layout, turns, spans, impl="triton")
        graph.replay()
        assert torch.equal(replayed[0], expected[0]), step
        assert torch.equal(replayed[1], expected[1]), step
