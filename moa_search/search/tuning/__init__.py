"""The outer loop: Optuna over a few knobs that the exact solver decodes into plans, judged by true loss."""

from moa_search.search.tuning.config import Tuning
from moa_search.search.tuning.knobs import Knobs, KnobSpace
from moa_search.search.tuning.loop import Summary, TrialResult, plan_of, tune, tune_in_parallel
from moa_search.search.tuning.trials import work

__all__ = [
    "KnobSpace",
    "Knobs",
    "Summary",
    "TrialResult",
    "Tuning",
    "plan_of",
    "tune",
    "tune_in_parallel",
    "work",
]
