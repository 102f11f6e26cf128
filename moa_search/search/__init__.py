"""The best rules for a budget, from a profile alone: no model, no GPU, no torch."""

from moa_search.search.losses import CRITERIA
from moa_search.search.searchers import SEARCHERS, Front, search_profile

__all__ = ["CRITERIA", "SEARCHERS", "Front", "search_profile"]
