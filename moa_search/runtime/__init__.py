"""Run a Hugging Face model under a plan, with a key-value cache that keeps only what the plan attends."""

from moa_search.runtime.apply import applied, apply_plan, remove_plan
from moa_search.runtime.cache import MoACache

__all__ = ["MoACache", "applied", "apply_plan", "remove_plan"]
