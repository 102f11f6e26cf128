"""Held-out scores of a model with and without a plan, with intervals."""

from moa_search.evaluation.compare import BASELINES, compare_variants, make_variants
from moa_search.evaluation.statistics import summarise
from moa_search.evaluation.tasks import TASKS

__all__ = ["BASELINES", "TASKS", "compare_variants", "make_variants", "summarise"]
