"""Which implementation runs: Triton kernels or their plain torch references.

``impl`` is ``"triton"``, ``"torch"`` or ``"auto"``. What an implementation can't do is an error, never another
result in silence; ``"auto"`` takes Triton for CUDA tensors that it supports and no gradient is asked of, torch
for everything else.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["HEAD_DIMS", "BackendUnavailableError", "Impl", "choose", "interpreting", "multiprocessors", "on_device_of"]

Impl = Literal["auto", "triton", "torch"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

HEAD_DIMS = range(1, 257)
"""Head dimensions that kernels take; they are padded to the next power of two, at least 16."""

OLDEST_CAPABILITY = (8, 0)

INTERPRETED_MULTIPROCESSORS = 4


class BackendUnavailableError(RuntimeError):
    """The implementation asked for can't run on these tensors, this device or these versions."""


def choose(
    impl: str, *tensors: Tensor, head_dim: int | None, dtypes: Sequence[torch.dtype] = DTYPES
) -> Literal["triton", "torch"]:
    """The implementation to run.

    Args:
        impl: What was asked for.
        *tensors: Inputs of one of ``dtypes``, all on one device.
        head_dim: Of keys and values; None for a kernel that takes any.
        dtypes: What the kernel takes; half or single precision by default.

    Raises:
        ValueError: ``impl`` is unknown.
        BackendUnavailableError: Triton was asked for and can't run; says why.
    """
    if impl not in get_args(Impl):
        raise ValueError(f'impl is {impl!r}; it must be "auto", "triton" or "torch"')
    if impl == "torch":
        return "torch"
    reason = _obstacle(tensors, head_dim, dtypes)
    if impl == "auto":
        return "torch" if reason or tensors[0].device.type != "cuda" else "triton"
    if reason:
        raise BackendUnavailableError(f'{reason}; use impl="torch" or "auto"')
    return "triton"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` when they were first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's device the current one: Triton launches there, wherever the tensors that it gets are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    return _multiprocessors(device) if device.type == "cuda" else INTERPRETED_MULTIPROCESSORS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _obstacle(tensors: tuple[Tensor, ...], head_dim: int | None, dtypes: Sequence[torch.dtype]) -> str | None:
    """Why Triton kernels can't run on these tensors, or None."""
    device = tensors[0].device
    if importlib.util.find_spec("triton") is None:
        return "Triton isn't installed (pip install triton, on Linux)"
    if device.type != "cuda" and not interpreting():
        return f"Triton kernels need a CUDA device, not {device.type!r}, or TRITON_INTERPRET=1 to be tried without one"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0, which the kernels need"
    if any(other.device != device for other in tensors):
        return "tensors lie on several devices"
    if tensors[0].dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, tensors[0].dtype)]
        return f"this Triton kernel takes {', '.join(names[:-1])}, not {names[-1]}"
    if any(other.dtype != tensors[0].dtype for other in tensors):
        return "tensors differ in type"
    if head_dim is not None and head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}; Triton kernels take 1 to {HEAD_DIMS[-1]}"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "Triton kernels have no gradient here; use torch.no_grad()"
    return None
