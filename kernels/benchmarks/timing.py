"""Cases, correctness gates and median times."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from moa_kernels.tune import measure

Run = Callable[[], Any]


class Skipped(Exception):  # noqa: N818  # no error: a reference that this device or version lacks
    """Why something isn't measured."""


@dataclass
class Case:
    """One kernel on one shape, beside what does the same work otherwise.

    Attributes:
        kernel: Name of the kernel.
        name: Of the case.
        shapes: What was run, for the record.
        run: The kernel.
        verify: Raises AssertionError unless the kernel is right; nothing is timed before.
        references: Other ways, each made (compiled, inputs laid out) by a call that gives the function to time.
        bytes: Least bytes that must be moved; 0 where arithmetic is the limit.
        facts: Further numbers for the record, such as an attention density.
    """

    kernel: str
    name: str
    shapes: dict[str, Any]
    run: Run
    verify: Callable[[], None]
    references: dict[str, Callable[[], Run]]
    bytes: int = 0
    facts: dict[str, float] = field(default_factory=dict)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of the largest copy that is worth its time."""
    elements = 2**28 if device.type == "cuda" else 2**22
    source = torch.empty(elements, device=device, dtype=torch.float32).normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / (measure(lambda: target.copy_(source), device) * 1e-3)


def versions(device: torch.device) -> dict[str, str]:
    """What numbers depend on."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    cuda = {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, **cuda}
