"""Rings of codes against histories that were coded and written token by token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from moa_kernels.backends import BackendUnavailableError
from moa_kernels.coded import append_codes, decode_codes, see_tokens, stored_states
from moa_kernels.codes import Transform, hadamard
from moa_kernels.codes.storage import ALIGNMENT, CodeLayout
from moa_kernels.codes.turns import Turns
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans

from ..codes_by_hand import CodedCase, written
from ..seeds import DEFAULT_SEEDS, seeds
from ..yardstick import DEVICE, DTYPES, Batch, assert_within

BATCH = Batch(lambda: (CodedCase.drawn(seed, DTYPES[seed % 3]).masked() for seed in range(DEFAULT_SEEDS)))


def same(found, expected):
    """Equal tensors, NaN included."""
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("seed", seeds(120))
def test_decoding_equals_attention_over_the_decoded_history(seed):
    case = CodedCase.drawn(seed, DTYPES[seed % 3])
    assert_within(decode_codes(*case.arguments, **case.options, impl="torch"), case.masked(), BATCH, seed)


@pytest.mark.parametrize("seed", range(20))
def test_decoding_in_double_precision_is_exact(seed, monkeypatch):
    monkeypatch.setattr("moa_kernels.coded.reference.TILE", 16)
    case = CodedCase.drawn(seed, torch.float64)
    exact = case.masked().exactly()
    output, lse = decode_codes(*case.arguments, **case.options, impl="torch")
    torch.testing.assert_close(output, exact.output, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lse, exact.lse.float())


def appended(case, draw, impl):
    """A case's cache, written in two calls with padding, and what was written by hand."""
    before = [draw.randint(0, length) for length in case.lens]
    most = max(length - first for length, first in zip(case.lens, before, strict=True)) + draw.choice([0, 3])
    fresh = []
    for vectors in (case.keys, case.values):
        batch, kv_heads, _, width = vectors.plain.shape
        rows = torch.full((batch, most, kv_heads, width), torch.nan, dtype=vectors.plain.dtype, device=DEVICE)
        for sample, (first, length) in enumerate(zip(before, case.lens, strict=True)):
            rows[sample, : length - first] = vectors.plain[sample, :, first:length].transpose(0, 1)
        fresh.append(rows.transpose(1, 2))
    stored = written(case.keys, case.values, before, case.layout)
    counts = [length - first for length, first in zip(case.lens, before, strict=True)]
    padded = any(count < most for count in counts)
    append_codes(
        *fresh,
        stored,
        torch.tensor(before, device=DEVICE),
        case.layout,
        case.turns,
        counts=torch.tensor(counts, device=DEVICE) if padded else None,
        impl=impl,
    )
    onto = written(case.keys, case.values, before, case.layout)
    return stored, written(case.keys, case.values, case.lens, case.layout, onto)


@pytest.mark.parametrize("seed", seeds(120))
def test_appending_equals_writing_token_by_token(seed):
    case = CodedCase.drawn(seed, (*DTYPES, torch.float64)[seed % 4])
    same(*appended(case, random.Random(seed), "torch"))


@pytest.mark.parametrize("seed", range(30))
def test_states_and_seen_tokens_are_the_decoded_history(seed):
    dtype = (*DTYPES, torch.float64)[seed % 4]
    case = CodedCase.drawn(seed, dtype)
    lens = torch.tensor(case.lens, device=DEVICE)
    position = case.layout.rings.positions(lens)
    head = case.layout.rings.heads(DEVICE)
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps} if dtype != torch.float64 else {}
    at = torch.arange(case.keys.plain.shape[2], device=DEVICE)[None]
    seen = see_tokens(case.keys.plain, case.values.plain, at, case.layout, case.turns, impl="torch")
    for found, whole, vectors in zip(
        stored_states(case.stored, lens, case.layout, case.turns, impl="torch"), seen, (case.keys, case.values),
        strict=True,
    ):  # fmt: skip
        assert found.dtype == whole.dtype == dtype
        whole_size = vectors.back.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(whole / whole_size, vectors.back / whole_size, **tolerance)
        for sample in range(len(case.lens)):
            expected = vectors.back[sample, head, position[sample].clamp(min=0)]
            expected = expected.masked_fill((position[sample] < 0)[:, None], 0)
            size = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            assert found.isfinite().all()
            torch.testing.assert_close(found[sample] / size, expected / size, **tolerance)


class TestLayout:
    def test_bytes_are_those_of_the_bits_and_heads_begin_aligned(self):
        layout = CodeLayout(RingLayout((10, 21, 4), (4, 4, 4)), (3, 16, 2), (2, 8, 4), 24, 2)
        assert layout.keys.rows == (9, 48, 6)
        assert layout.values.rows == (6, 24, 12)
        assert layout.keys.offsets == (0, 64, 64 + 816)
        assert all(offset % ALIGNMENT == 0 for side in (layout.keys, layout.values) for offset in side.offsets)
        assert layout.keys.nbytes == 64 + 816
        assert (layout.keys.scale_slots, layout.values.scale_slots) == (6, 6 + 17)
        assert layout.tensor(torch.device("cpu"))[1].tolist() == [[16, 64, 48, 6], [8, 48, 24, 6]]
        assert CodeLayout.from_flat(layout.flat) == layout

    def test_widths_that_do_not_pack_and_sinks_that_differ_are_refused(self):
        with pytest.raises(ValueError, match="width must divide by 8"):
            CodeLayout(RingLayout((10,), (4,)), (3,), (16,), 20, 2)
        with pytest.raises(ValueError, match="one sink"):
            CodeLayout(RingLayout((10, 10), (4, 3)), (4, 4), (4, 4), 16, 2)


def test_turns_of_transforms():
    balance, mean = torch.eye(8)[None] * 2, torch.arange(8.0)[None]
    key = Transform.balanced(balance, mean)
    turns = Turns.of([None, key], [Transform.rotation(1, 8), None], 8)
    torch.testing.assert_close(turns.key_into[0], torch.eye(8).double())
    torch.testing.assert_close(turns.key_into[1] @ turns.key_back[1], torch.eye(8).double())
    torch.testing.assert_close(turns.value_into[0], hadamard(8))
    assert turns.key_mean.tolist() == [[0.0] * 8, mean[0].tolist()]


class TestRefusals:
    CASE = CodedCase.drawn(1, torch.float32)

    def test_shapes_and_types(self):
        query, stored, lens, layout, turns, spans = self.CASE.arguments
        with pytest.raises(ValueError, match="query must be"):
            decode_codes(query[..., :-1], stored, lens, layout, turns, spans)
        with pytest.raises(ValueError, match=r"key_sinks must be contiguous torch\.float16"):
            decode_codes(query.half(), stored, lens, layout, turns, spans)
        with pytest.raises(ValueError, match="key_codes must be"):
            decode_codes(query, stored._replace(key_codes=stored.key_codes[:, :-1]), lens, layout, turns, spans)
        with pytest.raises(ValueError, match="differ in sinks"):
            decode_codes(query, stored, lens, layout, turns, HeadSpans(((999, 1000, 0, 0),) * len(spans.heads)))
        with pytest.raises(ValueError, match=r"value_back must be torch\.float64"):
            decode_codes(query, stored, lens, layout, replace(turns, value_back=turns.value_back.float()), spans)

    def test_types_that_kernels_do_not_take(self):
        case = CodedCase.drawn(1, torch.float64)
        with pytest.raises(BackendUnavailableError):
            decode_codes(*case.arguments, impl="cpu")
