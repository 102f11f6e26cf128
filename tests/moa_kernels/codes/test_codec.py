"""The codec as caches use it: bytes, chunks, sinks, and what transforms are for."""

import math

import pytest
import torch
from moa_kernels.codes import BITS, Codec, Transform, balance, dequantise, quantise, token_bytes, wants_transform

CODED = tuple(bits for bits in BITS if bits < 16)


def outlying(tokens=600, width=64, kv_heads=2, seed=0):
    """Queries, keys and values ``[kv_heads, tokens, width]`` as models have them: a mean, and few large channels."""
    rng = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(100)
    sizes = torch.exp(torch.randn(kv_heads, 1, width, generator=fixed))
    mean = 4 * sizes * torch.randn(kv_heads, 1, width, generator=fixed)
    turn = torch.linalg.qr(torch.randn(kv_heads, width, width, generator=fixed)).Q
    query = torch.randn(kv_heads, tokens, width, generator=rng) * torch.exp(
        torch.randn(kv_heads, 1, width, generator=fixed)
    )
    key = mean + torch.randn(kv_heads, tokens, width, generator=rng) * sizes
    return query @ turn * 0.5, key @ turn, torch.randn(kv_heads, tokens, width, generator=rng) * sizes


def calibrated(query, key):
    mean = key.double().mean(1)
    off = key.double() - mean[:, None]
    return Transform.balanced(balance(off.mT @ off, query.double().mT @ query.double())[0], mean)


def score_error(query, key, back):
    """Mean squared error of scores, what all keys of a query have in common left out, as softmax does."""
    error = query.double() @ (back.double() - key.double()).mT / math.sqrt(key.shape[-1])
    return (error - error.mean(-1, keepdim=True)).square().mean().item()


def min_max(x, bits):
    """What most caches do: integers between a token's least and largest number."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return low + ((x - low) / step).round() * step


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [64, 80, 128])
def test_bytes_are_what_token_bytes_says(bits, width):
    x = torch.randn(2, 3, 50, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes = Codec(bits, Transform.rotation(3, width) if wants_transform(bits) else None).encode(x)
    assert codes.nbytes == 2 * 3 * 50 * token_bytes(bits, width)


def test_token_bytes_in_numbers():
    assert [token_bytes(bits, 128) for bits in BITS] == [256, 130, 66, 50, 34]
    assert token_bytes(16, 64, plain_bytes=4) == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_16_bits_give_back_every_bit(dtype):
    x = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0, :3] = torch.tensor([math.nan, math.inf, -0.0])
    back = Codec(16).decode(Codec(16).encode(x), dtype)
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("width", [64, 80, 96])
def test_error_of_normal_numbers_under_a_rotation(bits, width):
    x = torch.randn(2, 3000, width, generator=torch.Generator().manual_seed(2))
    codec = Codec(bits, Transform.rotation(2, width))
    error = (codec.decode(codec.encode(x), torch.float32) - x).square().sum() / x.square().sum()
    most = {8: 1e-4, 4: 0.01168, 3: 0.03890, 2: 0.13487}[bits]  # D / (1 - D), D of Max's table
    assert error < 1.05 * most


@pytest.mark.parametrize("bits", CODED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chunks_give_the_bytes_of_the_whole(bits, dtype):
    query, key, _ = outlying(tokens=130)
    key = key.to(dtype)
    codec = Codec(bits, calibrated(query, key))
    whole = codec.encode(key[None].expand(3, -1, -1, -1))
    for start, stop in ((0, 1), (1, 2), (2, 67), (67, 130)):
        part = codec.encode(key[:, start:stop])
        assert torch.equal(part.packed, whole.packed[1, :, start:stop])
        assert torch.equal(part.scales, whole.scales[1, :, start:stop])
        assert torch.equal(codec.decode(part, dtype), codec.decode(whole, dtype)[2, :, start:stop])


@pytest.mark.parametrize("bits", BITS)
def test_sinks_are_seen_as_they_are(bits):
    query, key, _ = outlying(tokens=40)
    codec = Codec(bits, calibrated(query, key))
    seen = codec.seen(key, torch.arange(40), sink=16)
    assert torch.equal(seen[:, :16], key[:, :16])
    assert torch.equal(seen[:, 16:], codec.decode(codec.encode(key), key.dtype)[:, 16:])
    later = codec.seen(key[:, 16:], torch.arange(16, 40), sink=16)  # the second chunk of two
    assert torch.equal(later, seen[:, 16:])


def test_4_bits_lose_far_less_than_min_max_int4():
    query, key, value = outlying()
    codec = Codec(4, calibrated(*outlying(seed=1)[:2]))
    ours = score_error(query, key, codec.decode(codec.encode(key), torch.float32))
    assert ours < score_error(query, key, min_max(key, 4)) / 4
    rotated = Codec(4, Transform.rotation(2, 64))
    ours = (rotated.decode(rotated.encode(value), torch.float32) - value).square().mean()
    assert ours < (min_max(value, 4) - value).square().mean() / 2


def test_2_bits_need_the_measured_transform():
    query, key, _ = outlying()
    codec = Codec(2, calibrated(*outlying(seed=1)[:2]))
    ours = score_error(query, key, codec.decode(codec.encode(key), torch.float32))
    rotated = Codec(2, Transform.rotation(2, 64))
    assert ours < score_error(query, key, rotated.decode(rotated.encode(key), torch.float32)) / 4
    assert ours < score_error(query, key, dequantise(*quantise(key, 2), 2)) / 4
    spread = query.double() @ (key - key.mean(1, keepdim=True)).double().mT / 8
    assert ours < spread.var().item() / 4  # the scores themselves can still be told apart


@pytest.mark.parametrize("bits", CODED)
def test_a_nan_key_shows_and_spoils_no_other(bits):
    query, key, _ = outlying(tokens=20)
    codec = Codec(bits, calibrated(query, key))
    clean = codec.decode(codec.encode(key), torch.float32)
    key[1, 3, 7] = math.nan
    back = codec.decode(codec.encode(key), torch.float32)
    assert back[1, 3].isnan().all()
    back[1, 3] = clean[1, 3]
    assert torch.equal(back, clean)


@pytest.mark.parametrize("bits", [1, 5, 32])
def test_bits_that_nothing_stores_are_refused(bits):
    for make in (Codec, lambda bits: token_bytes(bits, 64)):
        with pytest.raises(ValueError, match=f"bits are {bits}; they must be one of 16, 8, 4, 3, 2"):
            make(bits)


def test_a_width_that_fills_no_bytes_is_refused():
    with pytest.raises(ValueError, match="vectors of 12 numbers don't pack into 3-bit codes"):
        token_bytes(3, 12)
    with pytest.raises(ValueError, match="vectors of 12 numbers don't pack into 3-bit codes"):
        Codec(3, Transform.rotation(1, 12)).encode(torch.randn(1, 2, 12))
