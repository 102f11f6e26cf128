"""Plan and profile files, where profiling, search and runtime meet."""

from moa_search.formats.plan import Plan, PlanLike
from moa_search.formats.profile import Profile
from moa_search.formats.signature import ModelSignature

__all__ = ["ModelSignature", "Plan", "PlanLike", "Profile"]
