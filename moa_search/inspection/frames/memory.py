"""Tables of memory before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from moa_search.formats import Plan
from moa_search.formats.memory import GIB, Engine, dense_need, plan_need
from moa_search.inspection.printing import Table, column

NOTE = "activations, the engine's own memory and what it leaves unused aside"


def memory_frame(plan: Plan, lengths: Sequence[int], batch: int, weights_bytes: int, engine: Engine) -> Table:
    """Weights, keys and values, and their sum by length, dense and under the plan.

    Args:
        plan: The plan.
        lengths: Contexts in tokens.
        batch: Samples.
        weights_bytes: Of the model.
        engine: As for `plan_need`.
    """
    dense, planned = dense_need(plan, weights_bytes), plan_need(plan, weights_bytes, engine)
    rows = [
        {
            "length": length,
            "weights": planned.fixed,
            "dense_cache": batch * dense.cache(length),
            "cache": batch * planned.cache(length),
            "share": planned.cache(length) / dense.cache(length),
            "dense_total": dense.total(length, batch),
            "total": planned.total(length, batch),
        }
        for length in lengths
    ]
    columns = [
        column("length", "tokens"),
        column("weights", form=_gib),
        column("dense_cache", "dense KV", _gib),
        column("cache", "KV", _gib),
        column("share", "of dense", lambda share: f"{share:.1%}"),
        column("dense_total", "dense, in all", _gib),
        column("total", "in all", _gib),
    ]
    title = f"GiB for {batch} sequence{'s' if batch > 1 else ''}, dense and under the plan in {engine}; {NOTE}"
    return Table(pd.DataFrame(rows), columns, title)


def card_frame(
    plan: Plan, lengths: Sequence[int], batch: int, weights_bytes: int, engine: Engine, cards_gib: Sequence[float]
) -> Table:
    """What fits cards, by their size: the longest context of the batch, and the largest batch at each length.

    Args:
        plan: The plan.
        lengths: Contexts in tokens.
        batch: Samples.
        weights_bytes: Of the model.
        engine: As for `plan_need`.
        cards_gib: Sizes in GiB.
    """
    needs = {"dense": dense_need(plan, weights_bytes), "plan": plan_need(plan, weights_bytes, engine)}
    rows: list[dict[str, float | str]] = []
    for card in cards_gib:
        for name, need in needs.items():
            longest = need.most_tokens(batch, int(card * GIB))
            rows.append(
                {
                    "card": card,
                    "cache": name,
                    "context": f"{longest} (all)" if longest == need.context else str(longest or "none"),
                    **{f"sequences@{length}": need.most_samples(length, int(card * GIB)) for length in lengths},
                }
            )
    columns = [column("card", "GiB", lambda size: f"{size:g}"), column("cache", left=True)]
    columns.append(column("context", f"longest context of {batch}"))
    columns += [column(f"sequences@{length}", f"most sequences @{length}") for length in lengths]
    return Table(pd.DataFrame(rows), columns, "What fits a card")


def _gib(count: float) -> str:
    return f"{count / GIB:.2f}"
