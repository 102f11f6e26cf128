"""A plan as one worker runs it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moa_search.errors import ConfigError
from moa_search.formats import Plan
from moa_search.head_groups import HeadGroups, group_heads
from moa_vllm.lookup import find_plan


@dataclass(frozen=True)
class Served:
    """A plan, and which KV heads share a block table.

    Attributes:
        plan: The plan.
        groups: Its heads by block table.
    """

    plan: Plan
    groups: HeadGroups


def served_plan(config: Any) -> Served:
    """The plan of a configuration, grouped for its longest context.

    Raises:
        ConfigError: It names none.
    """
    named = find_plan(config)
    if named is None:
        raise ConfigError("no plan is named; see docs/vllm.md")
    rules = tuple(tuple(layer) for layer in named.plan.rules)
    ranks = config.parallel_config.tensor_parallel_size
    groups = _grouped(rules, named.plan.min_span, config.model_config.max_model_len, named.groups, ranks)
    return Served(named.plan, groups)


@lru_cache(maxsize=4)
def _grouped(rules: Any, min_span: int, longest: int, groups: int | None, ranks: int) -> HeadGroups:
    # Every layer asks.
    return group_heads(rules, min_span=min_span, longest=longest, groups=groups, ranks=ranks)
