"""How much memory a run took, for its summary."""

from __future__ import annotations

import sys
from typing import Any

import torch


def on_gpu(model: Any) -> bool:
    """Whether any of a model's parameters lie on a GPU."""
    return any(parameter.is_cuda for parameter in model.parameters())


def reset_peak_memory() -> None:
    """Start counting anew on the GPUs; a process's own peak can't be reset."""
    for device in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(model: Any) -> int | None:
    """The most that this process held: on the GPUs together if the model lies there, else in main memory.

    None where the system doesn't say (Windows).
    """
    if on_gpu(model):
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
