"""Influence statistics: what shortening each head's view would cost."""

from moa_search.profiling.grid import window_grid
from moa_search.profiling.profiler import profile_samples

__all__ = ["profile_samples", "window_grid"]
