"""Keys and values in 16, 8, 4, 3 or 2 bits, one token and KV head at a time."""

from moa_kernels.codes.balancing import balance
from moa_kernels.codes.codec import BITS, SCALE_BYTES, Codec, Codes, token_bytes, wants_transform
from moa_kernels.codes.levels import Digits, dequantise, quantise
from moa_kernels.codes.moments import Moments
from moa_kernels.codes.packing import pack, unpack
from moa_kernels.codes.rotary import Rotary
from moa_kernels.codes.rotation import hadamard
from moa_kernels.codes.transforms import Transform

__all__ = [
    "BITS",
    "SCALE_BYTES",
    "Codec",
    "Codes",
    "Digits",
    "Moments",
    "Rotary",
    "Transform",
    "balance",
    "dequantise",
    "hadamard",
    "pack",
    "quantise",
    "token_bytes",
    "unpack",
    "wants_transform",
]
