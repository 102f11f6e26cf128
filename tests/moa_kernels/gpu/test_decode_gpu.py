"""Decode attention and cache append on a real device, under CUDA graphs too."""

from __future__ import annotations

import pytest
import torch
from moa_kernels.append import append_tokens
from moa_kernels.decode import span_decode
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans

from ..rings_by_hand import Case, poisoned_empty
from ..yardstick import DEVICE, DTYPES, Batch, assert_within, randn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SPANS = HeadSpans(((4, 68, 0, 0), (4, 20, 10, 32), (4, 5, 0, 256), (4, 132, -9, 128)))


def layout_for(tokens: int) -> RingLayout:
    """Rings that hold what `SPANS` attend after so many tokens: the first ones wrap often."""
    capacities = [
        min(tokens, max(floor, alpha + beta_256 * tokens // 256)) for _, floor, alpha, beta_256 in SPANS.heads
    ]
    return RingLayout(tuple(capacities), tuple(head[0] for head in SPANS.heads))


class Decoder:
    """One layer that decodes a token at a time from buffers that stay where they are.

    Args:
        layout: Of its cache.
        lens: Tokens per sample to start from; their keys and values are random.
        dtype: Of everything.
        head_dim: Of keys and values.
    """

    def __init__(self, layout: RingLayout, lens: list[int], dtype: torch.dtype, head_dim: int = 128) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.layout = layout
        batch, kv_heads = len(lens), len(layout.capacities)
        shape = (batch, layout.slots, head_dim)
        self.keys, self.values = (torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
        self.past = [randn(self.generator, batch, kv_heads, max(lens), head_dim, dtype=dtype) for _ in range(2)]
        counts = torch.tensor(lens, device=DEVICE)
        self.lens = torch.zeros_like(counts)
        append_tokens(self.keys, self.values, *self.past, self.lens, layout, counts=counts)
        self.lens += counts
        self.query = torch.empty(batch, 4 * kv_heads, 1, head_dim, dtype=dtype, device=DEVICE)
        self.new = [torch.empty(batch, kv_heads, 1, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]

    def draw(self) -> None:
        """The next token's query, key and value, in place."""
        for buffer in (self.query, *self.new):
            buffer.copy_(torch.randn(buffer.shape, generator=self.generator))

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the token and attend."""
        append_tokens(self.keys, self.values, *self.new, self.lens, self.layout)
        self.lens += 1
        return span_decode(self.query, self.keys, self.values, self.lens, self.layout, SPANS)


def drawn(seed: int) -> Case:
    return Case.drawn(seed, DTYPES[seed % 3], longest=700, head_dims=(40, 64, 80, 96, 128, 256))


BATCH = Batch(lambda: (drawn(seed).masked() for seed in range(60)))


@pytest.mark.parametrize("seed", range(120))
def test_random_layers_equal_float64(seed, monkeypatch):
    case = drawn(seed)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    found = span_decode(*case.arguments, **case.options, impl="triton")
    monkeypatch.undo()
    assert_within(found, case.masked(), BATCH, seed)


def test_graph_replay_equals_eager_while_rings_wrap():
    lens, steps = [3, 700, 64], 1000
    layout = layout_for(max(lens) + steps + 1)
    eager, replayed = (Decoder(layout, lens, torch.bfloat16) for _ in range(2))
    for decoder in (eager, replayed):
        decoder.draw()
        decoder.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = replayed.step()
    for step in range(steps):
        for decoder in (eager, replayed):
            decoder.draw()
        graph.replay()
        expected = eager.step()
        assert torch.equal(output, expected[0]), step
        assert torch.equal(lse, expected[1]), step
    assert replayed.lens.tolist() == [length + steps + 1 for length in lens]


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_give_equal_bits(dtype):
    decoder = Decoder(layout_for(5000), [4990, 17, 2048], dtype)
    decoder.draw()
    output, lse = decoder.step()
    for _ in range(50):
        again = span_decode(decoder.query, decoder.keys, decoder.values, decoder.lens, decoder.layout, SPANS)
        assert torch.equal(again[0], output)
        assert torch.equal(again[1], lse)


def test_a_decoding_loop_equals_the_reference_on_the_whole_history():
    lens, steps = [1, 230], 300
    everything = RingLayout((1000,) * 4, (4,) * 4)
    decoder = Decoder(layout_for(max(lens) + steps), lens, torch.float16, head_dim=64)
    whole_keys, whole_values = (torch.full((2, everything.slots, 64), float("nan"), device=DEVICE) for _ in range(2))
    before = torch.tensor(lens, device=DEVICE)
    append_tokens(
        whole_keys, whole_values, *(part.float() for part in decoder.past), before * 0, everything, counts=before
    )
    for step in range(steps):
        decoder.draw()
        append_tokens(whole_keys, whole_values, *(part.float() for part in decoder.new), decoder.lens, everything)
        output, lse = decoder.step()
        if step % 25 == 0 or step == steps - 1:
            expected = span_decode(
                decoder.query.float(), whole_keys, whole_values, decoder.lens, everything, SPANS, impl="torch"
            )
            torch.testing.assert_close(output.float(), expected[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)


def test_offsets_beyond_two_to_the_31_elements():
    layout = RingLayout((2**24 + 77, 600), (4, 4))  # head 1 and sample 1 start beyond 2**31 elements
    spans = HeadSpans(((4, 104, 0, 0), (4, 104, 0, 0)))
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    keys, values = (torch.zeros(2, layout.slots, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    near = RingLayout((600, 600), (4, 4))
    near_keys, near_values = (torch.zeros(2, near.slots, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    lens = torch.tensor([500, 430], device=DEVICE)
    new = [randn(generator, 2, 2, 500, 128, dtype=torch.bfloat16) for _ in range(2)]
    query = randn(generator, 2, 8, 1, 128, dtype=torch.bfloat16)
    append_tokens(keys, values, *new, lens * 0, layout, counts=lens)
    append_tokens(near_keys, near_values, *new, lens * 0, near, counts=lens)
    found = span_decode(query, keys, values, lens, layout, spans)
    expected = span_decode(query, near_keys, near_values, lens, near, spans)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[0].any()
