"""Packing: sizes, places, round trips."""

import pytest
import torch
from moa_kernels.codes.packing import PLANES, code_bytes, pack, unpack


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("width", [8, 64, 80, 96, 128, 256])
def test_round_trip_in_exactly_the_bits(bits, width):
    codes = torch.randint(0, 2**bits, (2, 3, 50, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.nbytes * 8 == codes.numel() * bits
    assert packed.shape[-1] == code_bytes(bits, width)
    assert torch.equal(unpack(packed, bits), codes)


def test_channels_lie_where_the_module_says():
    channels = torch.arange(16, dtype=torch.uint8)
    assert pack(channels, 4).tolist() == [b | (b + 8) << 4 for b in range(8)]
    two = channels % 4
    assert pack(two, 2).tolist() == [sum(int(two[b + 4 * i]) << (2 * i) for i in range(4)) for b in range(4)]
    three = channels % 8
    high = [sum(int(three[b + 4 * i] >> 1) << (2 * i) for i in range(4)) for b in range(4)]
    low = [sum(int(three[b + 2 * i] & 1) << i for i in range(8)) for b in range(2)]
    assert pack(three, 3).tolist() == high + low


@pytest.mark.parametrize(("bits", "width"), [(4, 7), (3, 12), (2, 6), (4, 0)])
def test_widths_that_fill_no_whole_bytes_are_refused(bits, width):
    with pytest.raises(ValueError, match=f"vectors of {width} numbers don't pack into {bits}-bit codes"):
        pack(torch.zeros(3, width, dtype=torch.uint8), bits)
