"""Which implementation runs: Triton kernels, the CPU library, or their plain torch references.

``impl`` is ``"triton"``, ``"cpu"``, ``"torch"`` or ``"auto"``. What an implementation can't do is an error, never
another result in silence. ``"auto"`` takes the implementation that `PREFERRED` names for the tensors' device, and torch
for everything that it can't do, saying why once in the log.

A further implementation is a member of `Backend`, a function in `OBSTACLES` that says what it can't do, a place in
`PREFERRED`, and a place in `MODULES`.
"""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Impl = Literal["auto", "triton", "cpu", "torch"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

HEAD_DIMS = range(1, 257)
"""Head dimensions that kernels take; Triton's are padded to the next power of two, at least 16."""

OLDEST_CAPABILITY = (8, 0)

INTERPRETED_MULTIPROCESSORS = 4


class BackendUnavailableError(RuntimeError):
    """The implementation asked for can't run on these tensors, this device or these versions."""


class Backend(enum.StrEnum):
    """An implementation that was found to run on some tensors; given as ``impl``, it isn't questioned again."""

    TRITON = "triton"
    CPU = "cpu"
    TORCH = "torch"


class Inputs(NamedTuple):
    """What decides whether an implementation can run.

    Attributes:
        devices: Of each tensor.
        dtypes: Of each tensor.
        head_dim: Of keys and values; None for an operation that takes any.
        takes: Types that the operation is defined for.
        gradient: Whether one is asked of it.
    """

    devices: tuple[torch.device, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dim: int | None
    takes: tuple[torch.dtype, ...]
    gradient: bool


def choose(impl: str, *tensors: Tensor, head_dim: int | None, dtypes: Sequence[torch.dtype] = DTYPES) -> Backend:
    """The implementation to run.

    Args:
        impl: What was asked for, or what was chosen before for tensors like these.
        *tensors: Inputs of one of ``dtypes``, all on one device.
        head_dim: Of keys and values; None for a kernel that takes any.
        dtypes: What the kernel takes; half or single precision by default.

    Raises:
        ValueError: ``impl`` is unknown.
        BackendUnavailableError: What was asked for can't run; says why.
    """
    if isinstance(impl, Backend):
        return impl
    if impl not in get_args(Impl):
        raise ValueError(f'impl is {impl!r}; it must be "auto", "triton", "cpu" or "torch"')
    asked = PREFERRED.get(tensors[0].device.type) if impl == "auto" else Backend(impl)
    if asked is None or asked is Backend.TORCH:
        return Backend.TORCH
    devices, types = tuple(tensor.device for tensor in tensors), tuple(tensor.dtype for tensor in tensors)
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    reason = _obstacle(asked, impl == "auto", devices, types, head_dim, tuple(dtypes), gradient)
    if reason is None:
        return asked
    if impl != "auto":
        raise BackendUnavailableError(f'{reason}; use impl="torch" or "auto"')
    return Backend.TORCH


def run(backend: str, operation: str, call: tuple[Any, ...]) -> Any:
    """Run an implementation that was chosen.

    Args:
        backend: The implementation.
        operation: Folder and function, such as ``"prefill.span_prefill"``.
        call: Its checked arguments, a tensor first.
    """
    folder, function = operation.split(".")
    with on_device_of(call[0]):
        return getattr(_module(backend, folder), function)(call)


@functools.cache
def _module(backend: str, folder: str) -> ModuleType:
    return importlib.import_module(MODULES[Backend(backend)].format(folder))


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


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """Name of a GPU that kernels aren't made for."""
    if torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY:
        return None
    return torch.cuda.get_device_name(device)


def _obstacle(backend: Backend, logged: bool, *inputs: Any) -> str | None:
    """Why an implementation can't run on these `Inputs`, or None; said in the log if wanted."""
    reason = OBSTACLES[backend](Inputs(*inputs))
    if reason is not None and logged:
        _log_once(f"torch runs instead of {backend}: {reason}")
    return reason


# A compiler can't look into it, and needn't: it reads no numbers. This is what `torch.compiler.assume_constant_result`
# does, which itself would import the compiler, and that Triton.
_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_obstacle(inputs: Inputs) -> str | None:
    """Why Triton kernels can't run on these inputs, or None."""
    device = inputs.devices[0]
    if device.type != "cuda" and not interpreting():
        return f"Triton kernels need a CUDA device, not {device.type!r}, or TRITON_INTERPRET=1 to be tried without one"
    if not _triton_installed():
        return "Triton isn't installed (pip install triton, on Linux)"
    if device.type == "cuda" and _too_old(device):
        return f"{_too_old(device)} is older than compute capability 8.0, which the kernels need"
    return _common_obstacle(inputs, "Triton kernels")


def _cpu_obstacle(inputs: Inputs) -> str | None:
    """Why the CPU library can't run on these inputs, or None; finds or compiles it where all else fits."""
    from moa_kernels.cpu.library import unavailable

    if inputs.devices[0].type != "cpu":
        return f"the CPU kernels need tensors on a CPU, not {inputs.devices[0].type!r}"
    return _common_obstacle(inputs, "the CPU kernels") or unavailable()


def _common_obstacle(inputs: Inputs, who: str) -> str | None:
    """What no kernel can do."""
    device, dtype = inputs.devices[0], inputs.dtypes[0]
    if any(other != device for other in inputs.devices):
        return "tensors lie on several devices"
    if dtype not in inputs.takes:
        names = [str(dtype).removeprefix("torch.") for dtype in (*inputs.takes, dtype)]
        return f"{who} take {', '.join(names[:-1])} here, not {names[-1]}"
    if any(other != dtype for other in inputs.dtypes):
        return "tensors differ in type"
    if inputs.head_dim is not None and inputs.head_dim not in HEAD_DIMS:
        return f"head_dim is {inputs.head_dim}; {who} take 1 to {HEAD_DIMS[-1]}"
    if inputs.gradient:
        return f"{who} have no gradient here; use torch.no_grad()"
    return None


OBSTACLES: dict[Backend, Callable[[Inputs], str | None]] = {
    Backend.TRITON: _triton_obstacle,
    Backend.CPU: _cpu_obstacle,
}
"""For each implementation but torch, why it can't run on some inputs, or None."""

PREFERRED = {"cuda": Backend.TRITON, "cpu": Backend.CPU}
"""What ``"auto"`` takes by type of device; torch elsewhere."""

MODULES = {
    Backend.TRITON: "moa_kernels.{}.launch",
    Backend.CPU: "moa_kernels.cpu.ops",
    Backend.TORCH: "moa_kernels.{}.reference",
}
"""Where an operation's function is; imported when it first runs."""
