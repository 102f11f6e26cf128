"""Influence of windows and codecs together against explicit attention over coded keys and values."""

import pytest
import torch
from moa_kernels.coded_influence import CODED_STATISTICS, coded_changes
from moa_kernels.coded_influence.reference import CodedInfluence, pair_totals
from moa_kernels.codes import Codec, Moments, Transform
from moa_kernels.influence import influence_statistics

CASES = [
    # heads, kv_heads, N, sink, softcap, sink logits, row_buckets
    (6, 2, 333, 0, None, False, 16),
    (3, 1, 97, 1, None, False, 7),
    (9, 3, 129, 16, None, False, 32),
    (6, 3, 301, 5, 8.0, False, 8),
    (4, 2, 301, 4, None, True, 8),
    (2, 2, 200, 0, 3.0, True, 5),
    (2, 1, 70, 100, None, False, 4),
    (2, 1, 1, 0, None, False, 4),
    (2, 1, 2, 0, None, True, 4),
]
KEY_BITS, VALUE_BITS = (16, 8, 4, 2), (16, 4, 3)


def drawn(heads, kv_heads, n, dtype=torch.float64):
    """Query, keys and values by codec, gradient."""
    generator = torch.Generator().manual_seed(n)
    query, grad_out = torch.randn(2, heads, n, 8, dtype=torch.float64, generator=generator)
    key, value = torch.randn(2, kv_heads, n, 8, dtype=torch.float64, generator=generator)
    return query * 2, 0.7 + key * torch.logspace(-1, 0.5, 8, dtype=torch.float64), value, grad_out


def coded(query, key, value, sink):
    """Keys and values as `coded_changes` takes them."""
    others = torch.randn(len(key), 50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_keys = Transform.balanced(*Moments.of(others, others + 0.5, others).key_statics()[:2])
    of_values = Transform.rotation(len(value), value.shape[-1])
    at = torch.arange(key.shape[1])
    keys = [Codec(bits, of_keys if bits < 8 else None).seen(key, at, sink) for bits in KEY_BITS]
    values = [Codec(bits, of_values if bits < 8 else None).seen(value, at, sink) for bits in VALUE_BITS]
    return torch.stack(keys), torch.stack(values)


def of_pairs(query, keys, values, grad_out, *, softcap=None, sink_logits=None, **options):
    """What every pair of codecs costs, ``[kv_heads, bucket, window, key_codec, value_codec]``."""
    call = CodedInfluence(query, keys, values, grad_out, **options, softcap=softcap, sink_logits=sink_logits)
    return dict(zip(CODED_STATISTICS, pair_totals(call), strict=True))


def outputs(query, key, value, scale, softcap, sink_logits, visible):
    """Attention in the plainest way, ``[heads, N, width]``."""
    group = len(query) // len(key)
    scores = query @ key.repeat_interleave(group, 0).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        column = sink_logits[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value.repeat_interleave(group, 0)
    return scores.softmax(-1) @ value.repeat_interleave(group, 0)


@pytest.mark.parametrize("windows", [(1, 2, 5, 17, 100, 129, 200), (16, 32, 48, 80, 160)])
@pytest.mark.parametrize(("heads", "kv_heads", "n", "sink", "softcap", "has_sinks", "row_buckets"), CASES)
def test_delta_is_what_explicit_coded_attention_costs(
    heads, kv_heads, n, sink, softcap, has_sinks, row_buckets, windows, monkeypatch
):
    monkeypatch.setattr("moa_kernels.influence.reference.CPU_SCORES", 2**14)  # several chunks even at these lengths
    query, key, value, grad_out = drawn(heads, kv_heads, n)
    logits = torch.randn(heads, dtype=torch.float64) * 2 if has_sinks else None
    windows = [*(w for w in windows if w < n), n]
    rows = -(-n // row_buckets)
    keys, values = coded(query, key, value, sink)
    sizes = {"windows": windows, "row_buckets": row_buckets, "bucket_rows": rows, "sink": sink}
    found = of_pairs(query, keys, values, grad_out, **sizes, scale=0.35, softcap=softcap, sink_logits=logits)

    i, j = torch.arange(n)[:, None], torch.arange(n)
    plain = outputs(query, key, value, 0.35, softcap, logits, j <= i)
    bucket = torch.arange(n) // rows
    for w, window in enumerate(windows):
        visible = (j <= i) & ((i - j < window) | (j < sink))
        for a in range(len(KEY_BITS)):
            for b in range(len(VALUE_BITS)):
                out = outputs(query, keys[a], values[b], 0.35, softcap, logits, visible)
                delta = (grad_out * (out - plain)).sum(-1).unflatten(0, (kv_heads, -1))  # [kv_heads, group, N]
                for name, each in (("squared", delta.square()), ("signed", delta)):
                    wanted, size = (
                        torch.zeros(kv_heads, row_buckets, dtype=torch.float64).index_add_(1, bucket, part.sum(1))
                        for part in (each, each.abs())
                    )
                    error = (found[name][:, :, w, a, b] - wanted).abs()
                    assert (error <= 1e-9 * size + 1e-14).all(), (name, window, KEY_BITS[a], VALUE_BITS[b])


def test_the_plain_pair_is_the_influence_of_spans_alone():
    query, key, value, grad_out = drawn(6, 2, 150)
    options = {"windows": [10, 32, 140, 150], "row_buckets": 5, "bucket_rows": 30, "sink": 10, "scale": 0.25}
    found = of_pairs(query, *coded(query, key, value, 10), grad_out, **options)
    alone = influence_statistics(query, key, value, grad_out, **options)
    for name in CODED_STATISTICS:
        torch.testing.assert_close(found[name][..., 0, 0], alone[name], rtol=1e-12, atol=1e-14)
    assert (found["squared"][:, :, 2:, 0, 0] == 0).all(), "sink 10 and window 140 see all 150 keys"
    assert (found["squared"][:, 1:, 2:, 1:, :] > 0).all(), "codes cost something even where all keys are seen"


def test_changes_are_those_of_keys_alone_and_values_alone():
    query, key, value, grad_out = drawn(6, 2, 150)
    options = {"windows": [32, 64, 150], "row_buckets": 5, "bucket_rows": 30, "sink": 10, "scale": 0.25}
    keys, values = coded(query, key, value, 10)
    pairs = of_pairs(query, keys, values, grad_out, **options)
    changes = coded_changes(query, keys, values, grad_out, **options, impl="torch")
    for name, both in pairs.items():
        plain = both[..., 0, 0]
        assert changes[name].shape[-1] == len(KEY_BITS) + len(VALUE_BITS) - 2
        for number in range(1, len(KEY_BITS)):
            torch.testing.assert_close(changes[name][..., number - 1], both[..., number, 0] - plain)
        for number in range(1, len(VALUE_BITS)):
            torch.testing.assert_close(changes[name][..., len(KEY_BITS) - 2 + number], both[..., 0, number] - plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float64(dtype):
    query, key, value, grad_out = (x.to(dtype) for x in drawn(6, 2, 400))
    keys, values = (x.to(dtype) for x in coded(query, key, value, 4))
    options = {"windows": [32, 64, 128, 400], "row_buckets": 8, "bucket_rows": 50, "sink": 4, "scale": 0.35}
    low = of_pairs(query, keys, values, grad_out, **options)
    high = of_pairs(*(x.double() for x in (query, keys, values, grad_out)), **options)
    torch.testing.assert_close(low["squared"].double(), high["squared"], rtol=1e-4, atol=1e-4)


def test_memory_is_linear_in_the_length():
    """The largest tensor that is allocated beside inputs and results holds a chunk of rows, not N of them."""

    def largest(n):
        inputs = drawn(2, 1, n)
        query, key, value, grad_out = (x.float() for x in inputs)
        keys, values = key[None].expand(4, -1, -1, -1), value[None].expand(4, -1, -1, -1)
        with torch.profiler.profile(profile_memory=True) as seen:
            of_pairs(
                query, keys, values, grad_out, windows=[256, n], row_buckets=4, bucket_rows=n // 4, sink=4, scale=0.35
            )
        return max(event.cpu_memory_usage for event in seen.events())

    assert largest(4096) < 2.5 * largest(2048)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"keys": torch.zeros(2, 20, 8)}, "query .* must be"),
        ({"values": torch.zeros(2, 2, 19, 8)}, "values are"),
        ({"grad_out": torch.zeros(6, 20, 7)}, "grad_out"),
        ({"windows": [4, 4]}, "windows are"),
        ({"bucket_rows": 4}, "4 buckets of 4 rows"),
        ({"sink": -1}, "sink is -1"),
        ({"sink_logits": torch.zeros(2)}, "sink_logits"),
    ],
)
def test_what_does_not_fit_is_refused(changed, says):
    fitting = {
        "query": torch.zeros(6, 20, 8),
        "keys": torch.zeros(3, 2, 20, 8),
        "values": torch.zeros(2, 2, 20, 8),
        "grad_out": torch.zeros(6, 20, 8),
    }
    options = {"windows": [4, 20], "row_buckets": 4, "bucket_rows": 5, "sink": 2, "scale": 1.0}
    with pytest.raises(ValueError, match=says):
        coded_changes(**{**fitting, **options, **changed}, impl="torch")
