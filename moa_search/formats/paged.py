"""Plans in the paged cache of a serving engine, where groups of KV heads share a block table."""

from __future__ import annotations

from moa_search.errors import UnsupportedInputError
from moa_search.formats.plan import Plan
from moa_search.formats.tiers import PLAIN
from moa_search.head_groups import HeadGroups, group_heads


def require_paged(plan: Plan, source: str) -> None:
    """Check that the vLLM plug-in can serve a plan, whatever the model.

    Args:
        plan: The plan.
        source: Names it in errors.

    Raises:
        UnsupportedInputError: It can't.
    """
    reasons = {
        "rules anchored at the prompt": plan.anchor != "position",
        "layers that keep their own sliding window": bool(plan.native_layers),
        "heads that store fewer than 16 bits": any(tier != PLAIN for layer in plan.tiers for tier in layer),
    }
    for what, found in reasons.items():
        if found:
            raise UnsupportedInputError(f"{source}: vLLM can't serve {what} yet; moa-serve --engine transformers can")


def grouped(plan: Plan, longest: int, groups: int | None = None) -> HeadGroups:
    """A plan's heads by block table.

    Args:
        plan: The plan.
        longest: Longest context in tokens.
        groups: Groups at most; by default `moa_search.head_groups.GROUPS`.
    """
    return group_heads(plan.rules, min_span=plan.min_span, longest=longest, groups=groups)
