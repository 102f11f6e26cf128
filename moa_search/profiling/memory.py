"""How much memory a run took, for its summary."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["peak_memory_bytes", "reset_peak_memory"]


def reset_peak_memory() -> None:
    """Start counting anew on the GPUs; a process's own peak can't be reset."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes() -> int:
    """The most that this process held: on the GPUs together where there are any, else in main memory."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
