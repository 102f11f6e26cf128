"""Dense caches in 8 or 4 bits, as vLLM stores them: one scale per token and head, no plan, no calibration.

References, after ``--kv-cache-dtype int8_per_token_head`` and ``int4_per_token_head`` of vLLM 0.32
(``vllm/v1/attention/ops``): every query sees what the cache holds, those of the prompt too. The scale is a float32; a
zero point hides in its low bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moa_search.errors import ModelUnsupportedError
from moa_search.modeling.attention import swapped
from moa_search.modeling.private import attention_of
from moa_search.modeling.text import text_config
from moa_search.runtime.codecs import rotation

IMPLEMENTATION = "moa_rival"
"""Name under which the attention function is registered with transformers."""

SCALE_BYTES: Final = 4

LEAST_SCALE: Final = 1e-6


@dataclass(frozen=True)
class Scheme:
    """How one token's key, or value, of one head is stored.

    Attributes:
        bits: Of a number.
        signed: Whether levels lie around zero, up to the largest magnitude; else from the least to the largest number.
        rotated: Whether a signed Hadamard rotation comes first.
    """

    bits: int
    signed: bool
    rotated: bool

    def seen(self, x: Tensor) -> Tensor:
        """What comes back of vectors ``[..., tokens, width]``, in their own type."""
        y = x.float()
        if self.rotated:
            turn = rotation(x.shape[-1]).into[0].to(x.device, torch.float32)
            y = y @ turn
        y = self._signed(y) if self.signed else self._between(y)
        return (y @ turn.T if self.rotated else y).to(x.dtype)

    def share(self, width: int) -> float:
        """Bytes of a vector of ``width`` numbers, over those of 16 bits."""
        return (-(-width * self.bits // 8) + SCALE_BYTES) / (2 * width)

    def _signed(self, y: Tensor) -> Tensor:
        largest = 2 ** (self.bits - 1) - 1
        scale: Tensor = (y.abs().amax(-1, keepdim=True) / largest).clamp(min=LEAST_SCALE)
        coded: Tensor = (y / scale).round().clamp(-largest - 1, largest)
        return coded * scale

    def _between(self, y: Tensor) -> Tensor:
        largest = 2**self.bits - 1
        low, high = y.aminmax(dim=-1, keepdim=True)
        scale: Tensor = ((high - low) / largest).clamp(min=LEAST_SCALE)
        zero = (-low / scale).round().clamp(0, largest)
        coded: Tensor = (y / scale + zero).round().clamp(0, largest)
        return (coded - zero) * scale


SCHEMES: Final = {
    "int8": Scheme(8, signed=True, rotated=False),
    "int4": Scheme(4, signed=False, rotated=True),
    "int4-plain": Scheme(4, signed=False, rotated=False),
}
"""vLLM's two, and 4 bits without the rotation that it has had since mid-2026."""


@contextmanager
def coded(model: Any, scheme: Scheme) -> Iterator[None]:
    """Run a model as if its cache stored every key and value under a scheme.

    Raises:
        ModelUnsupportedError: The model's attention isn't one that transformers looks up by name.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = attention_of(text_config(model.config))
    if name not in ALL_ATTENTION_FUNCTIONS or name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ModelUnsupportedError(
            f"rivals in fewer bits: {type(model).__name__} runs {name!r} attention; load it with sdpa"
        )
    dense = ALL_ATTENTION_FUNCTIONS[name]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        return dense(module, query, scheme.seen(key), scheme.seen(value), *rest, **options)

    with swapped(model, IMPLEMENTATION, attention, ALL_MASK_ATTENTION_FUNCTIONS[name]):
        yield
