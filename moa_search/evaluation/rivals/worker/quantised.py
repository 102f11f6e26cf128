"""transformers' quantised cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import QuantizedCache


def quantised_cache(config: Any, bits: int) -> Any:
    """An empty cache of a model's, with quanto as its backend.

    Args:
        config: Of the model.
        bits: Of a code.
    """
    _unpack_plainly()
    return QuantizedCache("quanto", config, nbits=bits)


def _unpack_plainly() -> None:
    """Let quanto unpack codes on a GPU by its plain code: its own kernel would be compiled first, for minutes."""
    from optimum.quanto.library.extensions.extension import get_extension, is_extension_available

    if not is_extension_available("quanto_cuda"):
        return

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        mask = 2**bits - 1
        return torch.cat([(packed >> shift) & mask for shift in range(0, 8, bits)])

    get_extension("quanto_cuda")._lib = SimpleNamespace(unpack=unpack)
