"""The CPU library against float64, on the problems of the Triton kernels' tests and on every width."""

from __future__ import annotations

import random

import pytest
import torch
from moa_kernels.append import append_tokens
from moa_kernels.backends import BackendUnavailableError, choose
from moa_kernels.cpu.calls import LayerCall
from moa_kernels.cpu.library import unavailable
from moa_kernels.decode import span_decode
from moa_kernels.prefill import span_prefill
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans

from .. import test_append, test_decode, test_prefill
from ..rings_by_hand import Case, written
from ..seeds import seeds
from ..yardstick import DTYPES, assert_within, randn

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.usefixtures("one_or_two_threads"),
]

WIDTHS = (16, 17, 24, 33, 40, 64, 72, 80, 96, 100, 112, 128, 160, 192, 255, 256)


@pytest.mark.parametrize("seed", seeds(160))
def test_prefill_is_as_close_to_float64_as_plain_torch(seed):
    test_prefill.check(test_prefill.make(seed)[0], "cpu", seed)


@pytest.mark.parametrize("seed", seeds(150))
def test_decoding_is_as_close_to_float64_as_plain_torch(seed):
    case = Case.drawn(seed, DTYPES[seed % 3])
    assert_within(span_decode(*case.arguments, **case.options, impl="cpu"), case.masked(), test_decode.BATCH, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width, dtype):
    """More keys than a tile, sinks and windows that end anywhere in one, a past whose keys aren't here."""
    generator = torch.Generator().manual_seed(width)
    for starts in (None, [-37], [-5]):
        query = randn(generator, 1, 6, 77, width, dtype=dtype)
        key, value = (randn(generator, 1, 2, 331, width, dtype=dtype) for _ in range(2))
        spans = HeadSpans(((20, 90, 0, 100), (140, 150, 0, 0)), 290)
        test_prefill.check(test_prefill.Problem(query, key, value, spans, starts, None, {}), "cpu", (width, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_decoding(width, dtype):
    for seed in range(4):
        case = Case.drawn(100 * seed + width, dtype, longest=300, head_dims=(width,))
        found = span_decode(*case.arguments, **case.options, impl="cpu")
        assert_within(found, case.masked(), test_decode.BATCH, (width, dtype, seed))


@pytest.mark.parametrize("seed", range(60))
def test_appending_equals_writing_token_by_token(seed):
    """Any type is stored by its bytes, keys and values of two widths."""
    layout, lens, counts, new, history, draw = test_append.drawn(seed)
    wide = draw.random() < 0.3
    ends = [length + count for length, count in zip(lens, counts, strict=True)]
    expected = written(history, ends, layout, wide)
    fresh = []
    for states in history:
        batch, kv_heads, _, width = states.shape
        rows = torch.full((batch, new, kv_heads, width), float("nan"), dtype=states.dtype)
        for sample, (length, end) in enumerate(zip(lens, ends, strict=True)):
            rows[sample, : end - length] = states[sample, :, length:end].transpose(0, 1)
        fresh.append(rows.transpose(1, 2))
    keys, values = written(history, lens, layout, wide)
    append_tokens(keys, values, *fresh, torch.tensor(lens), layout, counts=torch.tensor(counts), impl="cpu")
    assert test_append.same(keys, expected[0])
    assert test_append.same(values, expected[1])


@pytest.mark.parametrize("seed", range(30))
def test_a_step_stores_counts_and_attends_as_one_operation_after_the_other(seed):
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype, new, width = DTYPES[seed % 3], draw.choice([1, 1, 2, 8]), draw.choice([16, 40, 64])
    spans = HeadSpans(((4, 12, 2, 96), (4, 40, 0, 0)))
    layout = RingLayout((48 + new, 48 + new), (4, 4))
    lens = [draw.randint(0, 90) for _ in range(2)]
    history = tuple(randn(generator, 2, 2, 90 + new, width, dtype=dtype) for _ in range(2))
    fresh = [torch.stack([part[i, :, n : n + new] for i, n in enumerate(lens)]) for part in history]
    query = randn(generator, 2, 6, new, width, dtype=dtype)
    keys, values = written(history, lens, layout)
    expected = written(history, [length + new for length in lens], layout)
    counts = torch.tensor(lens)
    out = torch.empty(2, new, 6, width, dtype=dtype)
    call = LayerCall(query, spans, scale=0.2, softcap=None, sink_logits=None, out=out.transpose(1, 2))
    call.new_tokens(*fresh)
    call.before(counts)
    call.rings(keys, values, layout)
    call.run("step")
    assert counts.tolist() == [length + new for length in lens]
    assert test_append.same(keys, expected[0])
    assert test_append.same(values, expected[1])
    assert torch.equal(
        out.transpose(1, 2), span_decode(query, *expected, counts, layout, spans, scale=0.2, impl="cpu")[0]
    )


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_the_order_of_scores_around(scale):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (randn(generator, 1, 2, 50, 16, dtype=torch.float32) for _ in range(3))
    found, expected = (
        span_prefill(query, key, value, HeadSpans.dense(2), scale=scale, impl=i) for i in ("cpu", "torch")
    )
    torch.testing.assert_close(found, expected)


def test_a_row_does_not_depend_on_how_many_come_with_it():
    generator = torch.Generator().manual_seed(0)
    query = randn(generator, 1, 4, 300, 32, dtype=torch.float32)
    key, value = (randn(generator, 1, 2, 300, 32, dtype=torch.float32) for _ in range(2))
    spans = HeadSpans.of([(0, 128), (10, 32)], sink=5, min_span=37)
    whole, _ = span_prefill(query, key, value, spans, impl="cpu")
    parts = [
        span_prefill(query[:, :, a:b], key[:, :, :b], value[:, :, :b], spans, impl="cpu")[0]
        for a, b in ((0, 64), (64, 200), (200, 300))
    ]
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_two_runs_give_equal_bits():
    case = Case.drawn(3, torch.bfloat16, longest=900)
    first, second = (span_decode(*case.arguments, **case.options, impl="cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_takes_the_library_and_cpu_insists_on_it():
    states = torch.zeros(1, 1, 4, 16)
    assert choose("auto", states, head_dim=16) == "cpu"
    assert choose("auto", states.double(), head_dim=16) == "torch"
    with pytest.raises(
        BackendUnavailableError, match="the CPU kernels take float16, bfloat16, float32 here, not float64"
    ):
        choose("cpu", states.double(), head_dim=16)
    with pytest.raises(BackendUnavailableError, match="no gradient"):
        choose("cpu", states.clone().requires_grad_(), head_dim=16)
    with pytest.raises(BackendUnavailableError, match="need tensors on a CPU, not 'meta'"):
        choose("cpu", states.to("meta"), head_dim=16)
    with pytest.raises(BackendUnavailableError, match="head_dim is 257"):
        choose("cpu", states, head_dim=257)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_step_compiles_in_one_graph():
    query, keys, values, lens = test_decode.small()
    new = torch.randn(2, 2, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    expected = test_decode.step(query, keys.clone(), values.clone(), *new, lens)
    found = torch.compile(test_decode.step, fullgraph=True, backend="aot_eager")(query, keys, values, *new, lens)
    torch.testing.assert_close(found, expected)
