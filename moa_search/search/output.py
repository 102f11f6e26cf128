"""A front in a folder: the chosen plan, every plan, and a table of them."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_search.errors import ConfigError
from moa_search.formats import Plan
from moa_search.formats.files import atomic_write
from moa_search.search.searching import Front

__all__ = ["StoredPlan", "front_rows", "read_front", "write_front"]

PLAN_FILE = re.compile(r"plan-(\d+)\.json")


@dataclass(frozen=True)
class StoredPlan:
    """A plan of a front and its file."""

    path: Path
    plan: Plan


def read_front(folder: str | os.PathLike[str]) -> tuple[list[StoredPlan], str | None]:
    """The plans that `write_front` wrote, in their order, and the fingerprint of plan.json.

    Where plan.json is none of them it comes last, with the path that it would have; where there is no plan.json, the
    fingerprint is None.

    Raises:
        ConfigError: The folder holds no front.
        PlanFormatError: A plan is damaged.
    """
    root = Path(folder)
    front = root / "front"
    numbered = {int(match[1]): path for path in front.glob("plan-*.json") if (match := PLAN_FILE.fullmatch(path.name))}
    if not numbered:
        raise ConfigError(f"{folder}: it holds no front/plan-*.json; give the folder that moa-search wrote to")
    plans = [StoredPlan(numbered[number], Plan.load(numbered[number])) for number in sorted(numbered)]
    if not (root / "plan.json").exists():
        return plans, None
    chosen = Plan.load(root / "plan.json")
    if chosen.fingerprint not in {stored.plan.fingerprint for stored in plans}:
        plans.append(StoredPlan(front / f"plan-{max(numbered) + 1:02d}.json", chosen))
    return plans, chosen.fingerprint


def front_rows(front: Front) -> list[dict[str, Any]]:
    """One row per plan: its file, and density, attention density and predicted loss at each length."""
    rows = []
    for index, plan in enumerate(front.plans):
        row: dict[str, Any] = {"plan": _name(index)}
        for metrics in plan.predicted:
            row[f"density@{metrics.length}"] = metrics.density
            row[f"attention_density@{metrics.length}"] = metrics.attention_density
            row[f"loss@{metrics.length}"] = metrics.loss
            row[f"loss_error@{metrics.length}"] = metrics.loss_error
        row["gap"] = plan.provenance.gap if plan.provenance else None
        rows.append(row)
    return rows


def write_front(front: Front, folder: str | os.PathLike[str]) -> None:
    """Write ``plan.json``, ``front/plan-00.json`` ... and ``front/front.csv``; what belonged to an older front goes.

    Raises:
        ConfigError: The folder can't be written; older files stay as they were.
    """
    root = Path(folder)
    rows = front_rows(front)
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    contents = {root / "front" / row["plan"]: plan.dumps() for row, plan in zip(rows, front.plans, strict=True)}
    contents |= {root / "front" / "front.csv": text.getvalue(), root / "plan.json": front.chosen.dumps()}
    with contextlib.ExitStack() as all_or_none:
        for path, content in contents.items():
            file = all_or_none.enter_context(atomic_write(path))
            file.write(content.encode())
            file.flush()  # a full disk shows before the first file is replaced
    try:
        stale = [*(root / "front").glob("plan-*.json"), root / "front" / "densities.png", root / "validation.csv"]
        for path in stale:
            if path not in contents:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: its older plans can't be removed ({error.strerror or error})") from None


def _name(index: int) -> str:
    return f"plan-{index:02d}.json"
