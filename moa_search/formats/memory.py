"""What a model takes in memory, dense and under a plan, told from the plan's numbers before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moa_search.formats.paged import grouped
from moa_search.formats.plan import Plan
from moa_search.formats.tiers import PLAIN_BITS, token_bytes

Engine = Literal["transformers", "vllm"]

GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that grow with the batch and bytes that don't.

    Attributes:
        fixed: Weights, and what keys in few bits need beside them.
        cache: Keys and values of one sample by its tokens; never falls.
        context: Tokens at most.
    """

    fixed: int
    cache: Callable[[int], int]
    context: int

    def total(self, length: int, batch: int) -> int:
        """Bytes for a batch of samples of ``length`` tokens."""
        return self.fixed + batch * self.cache(length)

    def most_samples(self, length: int, room: int) -> int:
        """The largest batch of samples of ``length`` tokens that fits ``room`` bytes; 0 if none does."""
        return max(0, room - self.fixed) // self.cache(length)

    def most_tokens(self, batch: int, room: int) -> int:
        """The longest context of a batch that fits ``room`` bytes, up to `context`; 0 if none does."""
        low, high = 0, self.context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total(middle, batch) <= room else (low, middle - 1)
        return low


def dense_need(plan: Plan, weights_bytes: int) -> Need:
    """Without the plan: a 16-bit cache, in layers with a window of their own no longer than that."""
    model, natives = plan.model, len(plan.native_layers)
    each = 2 * model.num_key_value_heads * token_bytes(PLAIN_BITS, model.head_dim)
    whole = len(plan.patterns) - natives

    def cache(length: int) -> int:
        return each * (whole * length + natives * min(length, plan.native_window or length))

    return Need(weights_bytes, cache, model.usual_lengths[-1])


def plan_need(plan: Plan, weights_bytes: int, engine: Engine) -> Need:
    """Under the plan, blocks of the cache aside.

    Args:
        plan: The plan; for vLLM one that `require_paged` takes.
        weights_bytes: Of the model.
        engine: ``vllm`` holds in a group of heads what any of them attends.
    """
    context = plan.model.usual_lengths[-1]
    if engine == "transformers":
        transforms = plan.key_transforms
        return Need(weights_bytes + (0 if transforms is None else transforms.nbytes), plan.kv_bytes, context)
    dense, groups = dense_need(plan, weights_bytes), grouped(plan, context)
    return Need(weights_bytes, lambda length: round(groups.held(length) * dense.cache(length)), context)
