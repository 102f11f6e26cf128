"""Triton's decode over codes against float64 over what they stand for, all that isn't visible poisoned."""

from __future__ import annotations

import functools
import random

import pytest
import torch
from moa_kernels.backends import BackendUnavailableError
from moa_kernels.coded import decode_codes, see_tokens, stored_states
from moa_kernels.launch import LaunchConfig, overridden

from ..codes_by_hand import CodedCase
from ..rings_by_hand import poisoned_empty
from ..yardstick import Batch, assert_within, units_off
from .test_coded import appended, same

launch = pytest.importorskip("moa_kernels.coded.launch", reason="needs Triton")

DTYPES = (torch.float16, torch.bfloat16)
SEEDS = 16
EVERY_TIER = ((16, 2), (8, 3), (4, 4), (3, 8), (2, 16), (2, 2), (3, 3), (8, 8), (16, 16))


def drawn(seed, **options):
    return CodedCase.drawn(seed, DTYPES[seed % 2], **options)


BATCH = Batch(lambda: (drawn(seed).masked() for seed in range(SEEDS)))


def assert_right(found, masked, note):
    """As `assert_within`; keys are products in the query's type, so plain torch's log-sum-exp is of such keys, too."""
    exact, (output, lse) = masked.exactly(), found
    assert_within((output, exact.lse.float()), masked, BATCH, note)
    worst = worst_lse()[output.dtype]
    off = units_off(lse, exact.lse, exact.lse_unit)
    assert off <= 2 * worst, f"{note}: log-sum-exp is {off:.3g} units off, plain torch {worst:.3g}"


@functools.cache
def worst_lse():
    """Of plain torch with products in each type."""
    worst = dict.fromkeys(DTYPES, 0.0)
    for case in (drawn(seed).masked() for seed in range(SEEDS)):
        dtype, exact = case.query.dtype, case.exactly()
        off = units_off(case.plainly(dtype)[1].float(), exact.lse, exact.lse_unit)
        worst[dtype] = max(worst[dtype], off)
    return worst


def tiles_of(monkeypatch, tiles, block_n):
    """Launch with so many tiles of so many keys, merged two by two."""
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(launch, "MERGED_AT_ONCE", 2)
    monkeypatch.setattr(launch, "TILES_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: tiles)
    return overridden("coded_decode", LaunchConfig(16, block_n, 4, 2))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_layers_equal_attention_over_the_decoded_history(seed, monkeypatch):
    case, draw = drawn(seed), random.Random(seed)
    with tiles_of(monkeypatch, draw.choice([1, 2, 3, 5]), draw.choice([16, 32])):
        assert_right(decode_codes(*case.arguments, **case.options, impl="triton"), case.masked(), seed)


def test_every_pair_of_bits(monkeypatch):
    for first in range(0, len(EVERY_TIER), 3):
        case = drawn(103, longest=50, widths=(32,), tiers=EVERY_TIER[first:])
        with tiles_of(monkeypatch, 3, 16):
            assert_right(decode_codes(*case.arguments, **case.options, impl="triton"), case.masked(), first)


@pytest.mark.parametrize("seed", range(60, 70))
def test_appending_gives_the_bytes_of_writing_token_by_token(seed):
    """In float64: what a step codes equals what a prompt codes."""
    case = CodedCase.drawn(seed, (*DTYPES, torch.float32)[seed % 3], longest=25)
    same(*appended(case, random.Random(seed), "triton"))


@pytest.mark.parametrize("seed", range(80, 86))
def test_plain_vectors_are_those_of_plain_torch(seed):
    """Of new tokens, at any positions, and of every slot; those without a token are zeros."""
    case = CodedCase.drawn(seed, (*DTYPES, torch.float32)[seed % 3], longest=12)
    generator = torch.Generator().manual_seed(seed)
    batch, _, tokens, _ = case.keys.plain.shape
    at = torch.randint(0, 5000, (batch if seed % 2 else 1, tokens), generator=generator).sort().values
    new = case.keys.plain, case.values.plain, at, case.layout, case.turns
    # Rings that were never filled, and some that hold nothing of what they could.
    lens = case.arguments[2] // (1 if seed % 3 else 2)
    held = case.stored, lens, case.layout, case.turns
    for operation, arguments in ((see_tokens, new), (stored_states, held)):
        for found, expected in zip(
            operation(*arguments, impl="triton"), operation(*arguments, impl="torch"), strict=True
        ):
            assert found.dtype == expected.dtype
            assert found.isfinite().all()
            size = expected.double().abs().amax(-1, keepdim=True).clamp(min=1e-30)
            assert ((found.double() - expected.double()).abs() / size).max() <= 8 * torch.finfo(found.dtype).eps


def test_positions_of_several_digits(monkeypatch):
    monkeypatch.setattr(launch, "RADIX", 33)
    launch._angles.cache_clear()
    seed = next(seed for seed in range(200, 400) if drawn(seed, longest=1200, widths=(16,)).lens[0] > 1150)
    case = drawn(seed, longest=1200, widths=(16,), tiers=((4, 4), (2, 8), (3, 2)))
    with tiles_of(monkeypatch, 2, 32):
        assert_right(decode_codes(*case.arguments, **case.options, impl="triton"), case.masked(), seed)
    launch._angles.cache_clear()


def test_scales_of_values_may_differ_by_more_than_a_float16_holds():
    case = next(
        case for case in (drawn(2 * seed, tiers=((16, 4), (8, 2), (4, 8))) for seed in range(500, 900))
        if min(case.lens) > 60 and not case.layout.sink and case.query.shape[2] == 1
    )  # fmt: skip
    for factor in (1e-5, 500.0):
        scales = case.stored.value_scales.clone()
        scales[:, ::3] *= factor
        stored = case.stored._replace(value_scales=scales)
        query, _, *others = case.arguments
        found, expected = (
            decode_codes(query, stored, *others, **case.options, impl=impl)[0].double() for impl in ("triton", "torch")
        )
        size = expected.abs().amax((0, 2, 3), keepdim=True)
        assert ((found - expected).abs() / size).max() < 8 * torch.finfo(torch.float16).eps


def test_a_token_that_is_not_a_number_shows_where_it_is_seen():
    case = next(
        case for case in (drawn(2 * seed, tiers=((4, 4), (4, 4), (4, 4))) for seed in range(700, 900))
        if min(case.lens) > 60 and len(case.spans.heads) > 1 and case.layout.sink < 40 and case.query.shape[2] == 1
    )  # fmt: skip
    newest = (case.lens[0] - 1 - case.layout.sink) % case.layout.ring_slots[1]
    case.stored.key_scales[0, case.layout.keys.scale_offsets[1] + newest] = torch.nan
    output, _ = decode_codes(*case.arguments, **case.options, impl="triton")
    heads = output.shape[1] // len(case.spans.heads)
    assert output[0, heads : 2 * heads].isnan().all()
    assert output[0, :heads].isfinite().all()


def test_float32_is_not_for_tensor_cores():
    case = CodedCase.drawn(1, torch.float32)
    with pytest.raises(BackendUnavailableError, match="Triton kernels take float16, bfloat16 here, not float32"):
        decode_codes(*case.arguments, impl="triton")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_samples():
    query, stored, lens, *others = drawn(0).arguments
    output, lse = decode_codes(query[:0], stored.change(lambda part: part[:0]), lens[:0], *others, impl="triton")
    assert output.shape == query[:0].shape
    assert lse.shape == (*query.shape[:0], 0, *query.shape[1:3])
