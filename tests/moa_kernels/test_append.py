"""Appending to ring caches against the same writes one token after the other; copies are exact."""

from __future__ import annotations

import random

import pytest
import torch
from moa_kernels.append import append_tokens
from moa_kernels.backends import BackendUnavailableError
from moa_kernels.rings import RingLayout

from .rings_by_hand import written
from .seeds import seeds
from .yardstick import DEVICE, DTYPES, randn

launch = pytest.importorskip("moa_kernels.append.launch", reason="needs Triton")

LAYOUT = RingLayout((12, 7), (3, 0))


def same(found, expected):
    """Equal, NaN included."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def drawn(seed):
    """A layout, a cache that holds some tokens per sample, and the whole histories that it's to hold afterwards."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = (*DTYPES, torch.float64)[seed % 4]
    batch, kv_heads = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    new = draw.choice([1, 1, 2, 8, 9, 30, 70])
    sinks = [draw.choice([0, 0, 1, 4, 20, 200]) for _ in range(kv_heads)]
    capacities = [max(draw.choice([sink - 3, sink, sink + 1, sink + 9, sink + 40, 0]), 0) for sink in sinks]
    layout = RingLayout(tuple(capacities), tuple(sinks))
    lens = [draw.choice([0, 0, 1, draw.randint(0, 60)]) for _ in range(batch)]
    counts = [new if draw.random() < 0.4 else draw.randint(0, new) for _ in range(batch)]
    widths = draw.choice([1, 8, 20, 64]), draw.choice([8, 24])
    history = tuple(randn(generator, batch, kv_heads, 60 + new, width, dtype=dtype) for width in widths)
    return layout, lens, counts, new, history, draw


@pytest.mark.parametrize("seed", seeds(220))
def test_kernel_and_reference_equal_writing_token_by_token(seed, monkeypatch):
    layout, lens, counts, new, history, draw = drawn(seed)
    wide = draw.random() < 0.3
    padded = draw.random() < 0.7
    ends = [length + (count if padded else new) for length, count in zip(lens, counts, strict=True)]
    expected = written(history, ends, layout, wide)
    # Rows are views of [batch, new, kv_heads, width], as projections make them; padding is NaN.
    fresh = []
    for states in history:
        batch, kv_heads, _, width = states.shape
        rows = torch.full((batch, new, kv_heads, width), float("nan"), dtype=states.dtype, device=DEVICE)
        for sample, (length, end) in enumerate(zip(lens, ends, strict=True)):
            rows[sample, : end - length] = states[sample, :, length:end].transpose(0, 1)
        fresh.append(rows.transpose(1, 2))
    before = torch.tensor(lens, device=DEVICE)
    real = torch.tensor(counts, device=DEVICE) if padded else None
    monkeypatch.setattr(launch, "PREFILL_TOKENS", draw.choice([16, 64]))
    for impl in ("torch", "triton"):
        keys, values = written(history, lens, layout, wide)
        append_tokens(keys, values, *fresh, before, layout, counts=real, impl=impl)
        assert same(keys, expected[0]), impl
        assert same(values, expected[1]), impl
    assert before.tolist() == lens


def small():
    """A cache of zeros in `LAYOUT`, and three new tokens of ones."""
    cache = [torch.zeros(2, LAYOUT.slots, 16, device=DEVICE) for _ in range(2)]
    new = [torch.ones(2, 2, 3, 16, device=DEVICE) for _ in range(2)]
    names = ("keys", "values", "new_keys", "new_values", "lens", "layout")
    return dict(zip(names, (*cache, *new, torch.tensor([0, 30], device=DEVICE), LAYOUT), strict=True))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_chunk_equals_its_parts(impl):
    generator = torch.Generator().manual_seed(0)
    states = [randn(generator, 2, 2, 25, 16, dtype=torch.float32) for _ in range(2)]
    lens = torch.tensor([0, 17], device=DEVICE)
    whole, parts = small(), small()
    append_tokens(whole["keys"], whole["values"], *states, lens, LAYOUT, impl=impl)
    for start, end in ((0, 1), (1, 9), (9, 25)):
        new = [part[:, :, start:end] for part in states]
        append_tokens(parts["keys"], parts["values"], *new, lens + start, LAYOUT, impl=impl)
    assert torch.equal(whole["keys"], parts["keys"])
    assert torch.equal(whole["values"], parts["values"])


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("empty", ["batch", "tokens", "counts", "capacities"])
def test_nothing_to_write_changes_nothing(empty, impl):
    arguments = small()
    if empty == "batch":
        arguments = {name: part if name == "layout" else part[:0] for name, part in arguments.items()}
    elif empty == "tokens":
        arguments |= {name: arguments[name][:, :, :0] for name in ("new_keys", "new_values")}
    elif empty == "counts":
        arguments["counts"] = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    else:
        arguments |= {name: arguments[name][:, :0] for name in ("keys", "values")}
        arguments["layout"] = RingLayout((0, 0), (3, 0))
    append_tokens(**arguments, impl=impl)
    assert not arguments["keys"].any()
    assert not arguments["values"].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_more_counts_than_tokens_are_all_tokens(impl):
    many, all_of_them = small(), small()
    append_tokens(**many, counts=torch.full((2,), 99, device=DEVICE), impl=impl)
    append_tokens(**all_of_them, impl=impl)
    assert torch.equal(many["keys"], all_of_them["keys"])
    assert many["keys"].any()


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_cache_gets_no_gradient(impl):
    arguments = small()
    arguments["new_keys"].requires_grad_()
    append_tokens(**arguments, impl=impl)
    assert not arguments["keys"].requires_grad
    assert arguments["keys"].any()


WRONG = [
    ({"new_keys": torch.ones(2, 3, 3, 16)}, r"new_keys must be \[batch, 2, new, head_dim\], not \[2, 3, 3, 16\]"),
    ({"new_keys": torch.ones(2, 3, 16)}, "new_keys must be"),
    ({"new_values": torch.ones(2, 2, 4, 16)}, r"new_values must be \[2, 2, 3\] by value_dim, not \[2, 2, 4, 16\]"),
    ({"keys": torch.zeros(2, 18, 16)}, r"keys must be \[2, 19, 16\], not \[2, 18, 16\]"),
    ({"values": torch.zeros(2, 19, 8)}, r"values must be \[2, 19, 16\]"),
    ({"values": torch.zeros(2, 19, 16).half()}, "values are torch.float16, new ones torch.float32"),
    ({"keys": torch.zeros(2, 16, 19).mT}, "keys must be contiguous in their last dimension"),
    ({"lens": torch.tensor([1, 2]).int()}, r"lens must be int64 \[2\], not torch.int32"),
    ({"counts": torch.tensor([1])}, r"counts must be int64 \[2\]"),
    ({"impl": "cuda"}, "impl is 'cuda'"),
]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_wrong_arguments_are_named(changed, message, impl):
    with pytest.raises(ValueError, match=message):
        append_tokens(**small() | {"impl": impl} | changed)


def test_triton_refuses_what_it_can_not_do():
    states = ("keys", "values", "new_keys", "new_values")
    arguments = {name: part.to(torch.int32) if name in states else part for name, part in small().items()}
    with pytest.raises(BackendUnavailableError, match="not int32"):
        append_tokens(**arguments, impl="triton")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_operator_is_well_formed(impl):
    arguments = [part for name, part in small().items() if name != "layout"]
    for counts in (None, torch.tensor([1, 3], device=DEVICE)):
        torch.library.opcheck(torch.ops.moa_kernels.append_tokens, (*arguments, LAYOUT.flat, counts, impl))
