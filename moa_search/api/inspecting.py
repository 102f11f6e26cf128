"""Looking at plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moa_search.api.common import require_positive, require_writable

if TYPE_CHECKING:
    from moa_search.formats import Plan

__all__ = ["inspect_plan"]


def inspect_plan(plan: str | Plan, *, lengths: Sequence[int] = (), output: str | None = None) -> Plan:
    """Show a plan: spans per layer and KV head, densities and how it was found.

    Args:
        plan: Plan file; in Python also a Plan.
        lengths: Context lengths in tokens to show spans for; by default those the plan was made for.
        output: PNG file for a heat map of the spans.

    Returns:
        The plan.

    Raises:
        MoAError: The file is no valid plan.
    """
    from moa_search.errors import ConfigError
    from moa_search.formats import Plan
    from moa_search.inspection import default_lengths, save_heat_map
    from moa_search.search.budgets.specs import MAX_LENGTH

    if lengths:
        require_positive(lengths=min(lengths))
        if max(lengths) > MAX_LENGTH:
            raise ConfigError(f"lengths: {max(lengths)} is out of range; it must be at most {MAX_LENGTH}")
    loaded = plan if isinstance(plan, Plan) else Plan.load(plan)
    if output is not None:
        require_writable(output)
        save_heat_map(loaded, output, lengths=list(lengths) or default_lengths(loaded))
    return loaded
