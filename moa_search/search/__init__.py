"""The best rules for a budget, from a profile alone: no model, no GPU, no torch."""

from moa_search.formats.criteria import CRITERIA
from moa_search.options import SearchOptions
from moa_search.search.front import BudgetUse, Front
from moa_search.search.searchers import SEARCHERS
from moa_search.search.searching import search_profile, search_several

__all__ = ["CRITERIA", "SEARCHERS", "BudgetUse", "Front", "SearchOptions", "search_profile", "search_several"]
