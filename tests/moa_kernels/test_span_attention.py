from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moa_kernels import span_attention

from .yardstick import DTYPES, Batch, Masked, units_off

EXTRAS = [{}, {"softcap": 2.0}, {"sinks": True}, {"softcap": 1.5, "sinks": True}]


def per_row(query, key, value, mask, scale, softcap=None, sinks=None):
    """One row at a time, over the keys it attends only."""
    batch, heads, rows, _ = query.shape
    out = query.new_zeros(batch, heads, rows, value.shape[-1])
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                kept = mask[b % len(mask), i].nonzero().squeeze(1)
                if len(kept) == 0:
                    continue
                scores = key[b, kept] @ query[b, h, i] * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[h].exp())
                out[b, h, i] = (weights / total) @ value[b, kept]
    return out


def inputs(seed, batch, heads, rows, keys, dim=16, value_dim=16, dtype=torch.float64, shared=False):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(1 if shared else batch, rows, keys, generator=generator) < 0.4
    return randn(batch, heads, rows, dim), randn(batch, keys, dim), randn(batch, keys, value_dim), mask


def poison(key, value, mask):
    unread = ~mask.any(1).expand(len(key), -1)
    return key.masked_fill(unread[..., None], torch.nan), value.masked_fill(unread[..., None], torch.nan)


@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(*(st.integers(1, top) for top in (3, 4, 9, 40))),
    value_dim=st.sampled_from([8, 16]),
    extras=st.sampled_from(EXTRAS),
    shared=st.booleans(),
)
def test_equals_one_row_at_a_time_whatever_lies_in_unread_slots(seed, shape, value_dim, extras, shared):
    query, key, value, mask = inputs(seed, *shape, value_dim=value_dim, shared=shared)
    mask[:, 0] = False
    sinks = torch.randn(shape[1], dtype=torch.float64) if "sinks" in extras else None
    softcap = extras.get("softcap")
    expected = per_row(query, key, value, mask, 0.3, softcap, sinks)
    key, value = poison(key, value, mask)
    out = span_attention(query, key, value, mask, scale=0.3, softcap=softcap, sink_logits=sinks)
    assert (out[:, :, 0] == 0).all()
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("extras", EXTRAS)
def test_gradients_are_those_of_the_attended_keys(extras):
    query, key, value, mask = inputs(1, 2, 3, 5, 12)
    mask[:, 2] = False
    mask[:, :, 7] = False
    sinks = torch.randn(3, dtype=torch.float64) if "sinks" in extras else None
    softcap = extras.get("softcap")
    upstream = torch.randn(2, 3, 5, 16, dtype=torch.float64)

    def gradients(attention, *states):
        leaves = [state.detach().clone().requires_grad_() for state in states]
        return torch.autograd.grad((attention(*leaves) * upstream).sum(), leaves)

    expected = gradients(lambda q, k, v: per_row(q, k, v, mask, 0.3, softcap, sinks), query, key, value)
    found = gradients(
        lambda q, k, v: span_attention(q, k, v, mask, scale=0.3, softcap=softcap, sink_logits=sinks),
        query,
        *poison(key, value, mask),
    )
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def low_precision(seed, dtype, extras):
    """One KV head's heads, and the same as `span_attention` takes it."""
    query, key, value, mask = inputs(seed, 2, 3, 33, 65, dim=64, value_dim=64, dtype=dtype)
    options = {
        "scale": 0.125,
        "softcap": extras.get("softcap"),
        "sink_logits": torch.randn(3, generator=torch.Generator().manual_seed(seed)) if "sinks" in extras else None,
    }
    return Masked(query, key[:, None], value[:, None], mask[:, None], **options), (query, key, value, mask), options


BATCH = Batch(lambda: (low_precision(seed, dtype, EXTRAS[seed % 4])[0] for seed in range(12) for dtype in DTYPES))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("seed", range(3))
def test_error_in_low_precision_is_within_twice_that_of_plain_torch(seed, dtype, extras):
    problem, arguments, options = low_precision(seed, dtype, extras)
    out = span_attention(*arguments, **options)
    assert out.dtype == dtype
    exact = problem.exactly()
    assert units_off(out, exact.output, exact.output_unit) <= 2 * BATCH.worst(dtype)[0]
