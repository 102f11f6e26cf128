"""Held-out scores of a model with and without a plan, with intervals."""

from moa_search.evaluation.compare import BASELINES, compare_variants, make_variants
from moa_search.evaluation.effective import EffectiveContext, effective_context
from moa_search.evaluation.statistics import paired_differences, summarise

__all__ = [
    "BASELINES",
    "EffectiveContext",
    "compare_variants",
    "effective_context",
    "make_variants",
    "paired_differences",
    "summarise",
]
