"""Influence statistics: what shortening each head's view would cost."""

from moa_search.profiling.grid import window_grid
from moa_search.profiling.profiler import profile_samples, require_profilable
from moa_search.profiling.results import discard_results, results_folder

__all__ = ["discard_results", "profile_samples", "require_profilable", "results_folder", "window_grid"]
