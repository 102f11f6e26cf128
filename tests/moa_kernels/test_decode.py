"""Decode attention over ring caches that were written token by token, against float64 over the whole history."""

from __future__ import annotations

import random

import pytest
import torch
from moa_kernels.append import append_tokens
from moa_kernels.backends import BackendUnavailableError
from moa_kernels.decode import span_decode
from moa_kernels.launch import LaunchConfig, overridden
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans

from .rings_by_hand import Case, poisoned_empty, written
from .seeds import DEFAULT_SEEDS, seeds
from .yardstick import DEVICE, DTYPES, Batch, assert_within, randn

launch = pytest.importorskip("moa_kernels.decode.launch", reason="needs Triton")

SPANS = HeadSpans(((4, 12, 2, 96), (4, 40, 0, 0)))
LAYOUT = RingLayout((48, 48), (4, 4))


@pytest.fixture
def poison(monkeypatch):
    monkeypatch.setattr(torch, "empty", poisoned_empty)


def tiles_of(monkeypatch, tiles, block_n=16, block_m=16):
    """Launch with so many tiles of so many keys and rows, merged two by two."""
    monkeypatch.setattr(launch, "MERGED_AT_ONCE", 2)
    monkeypatch.setattr(launch, "TILES_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: tiles)
    return overridden("decode", LaunchConfig(block_m, block_n, 4, 2))


BATCH = Batch(lambda: (Case.drawn(seed, DTYPES[seed % 3]).masked() for seed in range(DEFAULT_SEEDS)))


@pytest.mark.parametrize("seed", seeds(210))
def test_kernel_and_reference_equal_attention_over_the_whole_history(seed, monkeypatch, poison):
    case = Case.drawn(seed, DTYPES[seed % 3])
    draw = random.Random(seed)
    masked = case.masked()
    assert_within(span_decode(*case.arguments, **case.options, impl="torch"), masked, BATCH, "torch")
    with tiles_of(monkeypatch, draw.choice([1, 2, 3, 5]), draw.choice([16, 32]), draw.choice([16, 64])):
        assert_within(span_decode(*case.arguments, **case.options, impl="triton"), masked, BATCH, "triton")


def small(new=1, head_dim=16, lens=(70, 45), dtype=torch.float32):
    """A query and a full cache in `LAYOUT`, everything stored at once."""
    generator = torch.Generator().manual_seed(new)
    query = randn(generator, len(lens), 6, new, head_dim, dtype=dtype)
    states = [randn(generator, len(lens), 2, max(lens), head_dim, dtype=dtype) for _ in range(2)]
    keys, values = (torch.full((len(lens), LAYOUT.slots, head_dim), float("nan"), dtype=dtype).to(DEVICE) for _ in "kv")
    counts = torch.tensor(lens, device=DEVICE)
    append_tokens(keys, values, *states, torch.zeros_like(counts), LAYOUT, counts=counts, impl="torch")
    return query, keys, values, counts


@pytest.mark.parametrize("tiles", [1, 7, 12])
def test_two_runs_give_equal_bits(tiles, monkeypatch, poison):
    arguments = small(new=3, dtype=torch.float16)
    with tiles_of(monkeypatch, tiles):
        first, second = (span_decode(*arguments, LAYOUT, SPANS, impl="triton") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_the_number_of_tiles_only_rounds(monkeypatch):
    arguments = small(new=2)
    results = []
    for tiles in (1, 5, 20):
        with tiles_of(monkeypatch, tiles):
            results.append(span_decode(*arguments, LAYOUT, SPANS, impl="triton"))
    for output, lse in results[1:]:
        torch.testing.assert_close(output, results[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-5, atol=1e-5)


def test_many_pairs_are_planned_piece_by_piece(monkeypatch, poison):
    monkeypatch.setattr(launch, "PLANNED_AT_ONCE", (2, 4))
    arguments = small(lens=(70, 3, 0, 41, 19))
    with tiles_of(monkeypatch, 6):
        found = span_decode(*arguments, LAYOUT, SPANS, impl="triton")
    expected = span_decode(*arguments, LAYOUT, SPANS, impl="torch")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_tokens_one_by_one_equal_a_chunk(impl, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query = randn(generator, 2, 6, 5, 16, dtype=torch.float32)
    states = [randn(generator, 2, 2, 5, 16, dtype=torch.float32) for _ in range(2)]
    _, keys, values, lens = small(lens=(61, 8))
    single_keys, single_values = keys.clone(), values.clone()
    with tiles_of(monkeypatch, 3):
        append_tokens(keys, values, *states, lens, LAYOUT, impl=impl)
        output, lse = span_decode(query, keys, values, lens + 5, LAYOUT, SPANS, impl=impl)
        for token in range(5):
            row = slice(token, token + 1)
            new = [part[:, :, row] for part in states]
            append_tokens(single_keys, single_values, *new, lens + token, LAYOUT, impl=impl)
            found = span_decode(
                query[:, :, row], single_keys, single_values, lens + token + 1, LAYOUT, SPANS, impl=impl
            )
            torch.testing.assert_close(found, (output[:, :, row], lse[:, :, row]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single_keys, keys, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("capacities", "window"), [((14, 14), 10), ((4, 4), 0), ((3, 2), 0), ((0, 0), 0)])
def test_a_cache_too_small_has_the_sink_and_the_newest_keys(capacities, window, impl):
    layout = RingLayout(capacities, (4, 4))
    query, _, _, lens = small()
    generator = torch.Generator().manual_seed(7)
    states = [randn(generator, 2, 2, 70, 16, dtype=torch.float32) for _ in range(2)]
    keys, values = written(states, lens.tolist(), layout)
    output, lse = span_decode(query, keys, values, lens, layout, SPANS, impl=impl)
    for sample, length in enumerate(lens.tolist()):
        for head, capacity in enumerate(capacities):
            held = [*range(min(capacity, 4)), *range(length - window, length)]
            key, value = (part[sample, head, held] for part in states)
            logits = query[sample, 3 * head : 3 * head + 3, 0] @ key.mT / 4
            torch.testing.assert_close(lse[sample, 3 * head : 3 * head + 3, 0], logits.logsumexp(-1))
            expected = logits.softmax(-1) @ value
            torch.testing.assert_close(output[sample, 3 * head : 3 * head + 3, 0], expected)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_an_empty_batch_gives_empty_results(impl):
    query, keys, values, lens = small()
    output, lse = span_decode(query[:0], keys[:0], values[:0], lens[:0], LAYOUT, SPANS, impl=impl)
    assert output.shape == (0, 6, 1, 16)
    assert lse.shape == (0, 6, 1)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_sink_logit_alone_takes_all_weight(impl):
    query, keys, values, lens = small()
    logits = torch.linspace(-2, 3, 6, device=DEVICE)
    output, lse = span_decode(query, keys, values, lens * 0, LAYOUT, SPANS, sink_logits=logits, impl=impl)
    assert not output.any()
    torch.testing.assert_close(lse, logits[None, :, None].expand(2, 6, 1))


def test_float64_is_computed_as_such():
    case = Case.drawn(5, torch.float64)
    output, _ = span_decode(*case.arguments, **case.options)
    torch.testing.assert_close(output, case.masked().exactly().output, rtol=1e-12, atol=1e-12)


WRONG = [
    ({"query": torch.zeros(2, 6, 16)}, r"query must be \[batch, heads, new, head_dim\]"),
    ({"query": torch.zeros(2, 6, 9, 16)}, "9 new tokens; span_decode takes 1 to 8"),
    ({"query": torch.zeros(2, 6, 0, 16)}, "0 new tokens"),
    ({"query": torch.zeros(2, 5, 1, 16)}, "5 query heads can't share 2 KV heads evenly"),
    ({"query": torch.zeros(2, 6, 1, 8)}, r"keys must be \[2, 96, 8\], not \[2, 96, 16\]"),
    ({"keys": torch.zeros(2, 95, 16)}, r"keys must be \[2, 96, 16\], not \[2, 95, 16\]"),
    ({"values": torch.zeros(1, 96, 16)}, r"values must be \[2, 96, 16\]"),
    ({"values": torch.zeros(2, 96, 16).half()}, "values are torch.float16, query is torch.float32"),
    ({"keys": torch.zeros(2, 16, 96).mT}, "keys must be contiguous in head_dim"),
    ({"lens": torch.tensor([1, 2, 3])}, r"lens must be int64 \[2\]"),
    ({"lens": torch.tensor([1, 2]).int()}, "not torch.int32"),
    ({"spans": HeadSpans.dense(3)}, "layout has 2 KV heads, spans 3"),
    ({"spans": HeadSpans.dense(2)}, r"differ in sinks: \(4, 4\) and \[0, 0\]"),
    ({"softcap": 0.0}, "softcap is 0.0; it must be positive"),
    ({"softcap": float("nan")}, "softcap is nan"),
    ({"sink_logits": torch.zeros(2)}, r"sink_logits must be \[6\], not \[2\]"),
    ({"impl": "cuda"}, "impl is 'cuda'"),
]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_wrong_arguments_are_named(changed, message, impl):
    query, keys, values, lens = small()
    arguments = {"query": query, "keys": keys, "values": values, "lens": lens, "layout": LAYOUT, "spans": SPANS}
    with pytest.raises(ValueError, match=message):
        span_decode(**arguments | {"impl": impl} | changed)


def test_triton_refuses_what_it_can_not_do():
    query, keys, values, lens = small(dtype=torch.float64)
    with pytest.raises(BackendUnavailableError, match="float64"):
        span_decode(query, keys, values, lens, LAYOUT, SPANS, impl="triton")


def step(query, keys, values, new_keys, new_values, lens):
    """A decoding step, as a model's attention layer runs it."""
    append_tokens(keys, values, new_keys, new_values, lens, LAYOUT)
    output, lse = span_decode(query * 2, keys, values, lens + 1, LAYOUT, SPANS, softcap=20.0)
    return output + 1, lse


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_step_compiles_in_one_graph():
    query, keys, values, lens = small()
    new = torch.randn(2, 2, 2, 1, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected = step(query, expected_keys, expected_values, *new, lens)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(query, keys, values, *new, lens)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(keys, expected_keys, equal_nan=True)
    torch.testing.assert_close(values, expected_values, equal_nan=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_is_well_formed(monkeypatch):
    query, keys, values, lens = small()
    tensors = (query, keys.nan_to_num(0), values.nan_to_num(0), lens)
    operator = torch.ops.moa_kernels.span_decode
    for sink_logits in (None, query[0, :, 0, 0]):
        torch.library.opcheck(
            operator, (*tensors, LAYOUT.flat, SPANS.flat, SPANS.sliding_window, 0.25, None, sink_logits, "torch")
        )
    with tiles_of(monkeypatch, 1):
        arguments = (*tensors, LAYOUT.flat, SPANS.flat, SPANS.sliding_window, 0.25, 9.0, None, "triton")
        torch.library.opcheck(operator, arguments, test_utils="test_schema")
