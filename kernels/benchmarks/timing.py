"""Cases, correctness gates and median times."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Case", "Skipped", "copy_bandwidth", "measure", "versions"]

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


def measure(run: Run, device: torch.device, milliseconds: int = 200) -> float:
    """Median time of one call in milliseconds, with a cold L2 cache; on a GPU without the host's share."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    from triton.testing import do_bench

    return float(do_bench(_captured(run), warmup=milliseconds // 4, rep=milliseconds, return_mode="median"))


def _captured(run: Run) -> Run:
    """The call as a CUDA graph: launches of several kernels would otherwise be timed with the host's gaps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
