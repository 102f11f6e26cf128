"""Rings of codes by the CPU library: against float64 of what codes give back, and byte for byte against torch."""

from __future__ import annotations

import random

import pytest
import torch
from moa_kernels.coded import append_codes, decode_codes, see_tokens, stored_states
from moa_kernels.cpu.library import unavailable

from ..coded.test_coded import BATCH, appended, same
from ..codes_by_hand import CodedCase
from ..seeds import seeds
from ..yardstick import DTYPES, assert_within

pytestmark = [
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
    pytest.mark.usefixtures("one_or_two_threads"),
]

WIDTHS = (16, 17, 24, 40, 64, 72, 80, 96, 112, 128, 192, 255, 256)


@pytest.mark.parametrize("seed", seeds(160))
def test_decoding_is_as_close_to_float64_as_plain_torch(seed):
    case = CodedCase.drawn(seed, DTYPES[seed % 3])
    assert_within(decode_codes(*case.arguments, **case.options, impl="cpu"), case.masked(), BATCH, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(width, dtype):
    """More keys than a chunk, over several blocks of positions."""
    for seed in (width % 2, 2):
        case = CodedCase.drawn(100 * seed + width, dtype, longest=260, widths=(width,))
        found = decode_codes(*case.arguments, **case.options, impl="cpu")
        assert_within(found, case.masked(), BATCH, (width, dtype, seed))


@pytest.mark.parametrize("seed", seeds(120))
def test_appending_equals_writing_token_by_token(seed):
    case = CodedCase.drawn(seed, DTYPES[seed % 3], widths=(8, 16, 24, 40, 64, 96, 128))
    same(*appended(case, random.Random(seed), "cpu"))


@pytest.mark.parametrize("seed", range(20))
def test_states_and_seen_tokens_are_those_of_torch(seed):
    dtype = DTYPES[seed % 3]
    case = CodedCase.drawn(seed, dtype, longest=200, widths=(16, 24, 64, 80, 128))
    lens, at = torch.tensor(case.lens), torch.arange(case.keys.plain.shape[2])[None]
    whole = case.keys.plain, case.values.plain, at, case.layout, case.turns
    rings = case.stored, lens, case.layout, case.turns
    for operation, arguments in ((see_tokens, whole), (stored_states, rings)):
        for found, expected in zip(operation(*arguments, impl="cpu"), operation(*arguments, impl="torch"), strict=True):
            assert found.dtype == dtype
            size = expected.double().abs().amax(-1, keepdim=True).clamp(min=1e-30)
            off = (found.double() - expected.double()).abs() / size
            assert off.max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, 1e30, 0.0])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_numbers_that_no_code_holds_give_the_bytes_of_torch(bits, spoilt):
    case = CodedCase.drawn(3, torch.float32, widths=(64,), tiers=((bits, bits),) * 3)
    batch, kv_heads, _, width = case.keys.plain.shape
    fresh = [torch.randn(batch, kv_heads, 3, width, generator=torch.Generator().manual_seed(side)) for side in (0, 1)]
    for states in fresh:
        states[:, :, 1, 5] = spoilt
        states[:, :, 2] = 0
    results = []
    for impl in ("cpu", "torch"):
        stored = case.stored.change(torch.clone)
        append_codes(*fresh, stored, torch.tensor(case.lens), case.layout, case.turns, impl=impl)
        results.append(stored)
    same(*results)


def test_two_runs_give_equal_bits():
    case = CodedCase.drawn(3, torch.bfloat16, longest=300)
    first, second = (decode_codes(*case.arguments, **case.options, impl="cpu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
