"""Run a Hugging Face model under a plan, with a key-value cache that keeps only what the plan attends."""

from moa_search.runtime.apply import applied, apply_plan, remove_plan
from moa_search.runtime.cache import MoACache
from moa_search.runtime.loading import from_pretrained

__all__ = ["MoACache", "applied", "apply_plan", "from_pretrained", "remove_plan"]
