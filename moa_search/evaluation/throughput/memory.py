"""The most memory that a stretch of code has in use, weights included."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux wants to be told to start the peak again at what is resident now."""


class PeakMemory:
    """Measures within a ``with`` block.

    On a GPU, the most that torch's allocator had handed out on that device; on a CPU under Linux, the peak of the
    process's resident memory, its libraries (some hundred MB) included, after what is free has been given back to the
    system.

    Attributes:
        peak_bytes: The result, once the block has ended without an error; None where it can't be known.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # so that every run finds the allocator alike
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif can_measure(self.device):
            ctypes.CDLL(None).malloc_trim(0)
            RESET.write_text(RESET_PEAK, encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            return
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif can_measure(self.device):
            line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
            self.peak_bytes = int(line.split()[1]) * 1024


def can_measure(device: torch.device) -> bool:
    """Whether peaks can be known on a device."""
    if device.type == "cuda":
        return True
    return device.type == "cpu" and RESET.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Make garbage collection look at new objects only: it would walk torch's and transformers' for a second each."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
