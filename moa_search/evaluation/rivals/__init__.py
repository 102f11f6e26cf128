"""What people would use instead of a plan: dense caches in fewer bits, and kvpress's methods."""

from moa_search.evaluation.rivals.measuring import Elsewhere, coded_variants
from moa_search.evaluation.rivals.naming import QUESTIONS, Rival, parse_rivals

__all__ = ["QUESTIONS", "Elsewhere", "Rival", "coded_variants", "parse_rivals"]
