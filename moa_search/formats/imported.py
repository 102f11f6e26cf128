"""What a plan from another format says of its origin and cost."""

from __future__ import annotations

from collections.abc import Sequence

from moa_search.formats.plan import Plan
from moa_search.formats.provenance import Provenance


def imported(plan: Plan, origin: str, notes: Sequence[str], lengths: Sequence[int]) -> Plan:
    """``plan`` with its origin, what the import changed, its densities and shares of bytes at ``lengths``."""
    provenance = Provenance(searcher=f"imported {origin}", notes=tuple(notes))
    return plan.model_copy(update={"provenance": provenance, "predicted": tuple(map(plan.metrics, lengths))})
