"""What the tests of kernels share: random inputs, and how far a result may be off."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DEVICE", "DTYPES", "assert_within_yardstick", "randn"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn on the CPU, rounded to ``dtype``, on `DEVICE`."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def assert_within_yardstick(found: Tensor, exact: Tensor, plain: Tensor, note: object = "") -> None:
    """FlashAttention's rule: at most twice as far from float64 as plain torch in the inputs' own precision.

    Args:
        found: What the kernel gave.
        exact: The same in float64.
        plain: The same by torch operations in low precision.
        note: Shown when it fails.
    """
    assert found.shape == exact.shape, note
    assert torch.isfinite(found).all(), note
    error = (found.double() - exact).abs().max().item()
    yardstick = (plain.double() - exact).abs().max().item()
    # Where plain torch happens to be exact (a single key), the result's own rounding remains.
    rounding = torch.finfo(found.dtype).eps * max(exact.abs().max().item(), 1.0)
    assert error <= 2 * yardstick + rounding, f"{note}: error {error:.3g}, plain torch {yardstick:.3g}"
