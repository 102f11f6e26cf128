"""Plans that trade losses against each other, and their folder: the chosen plan, every plan, and a table of them."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa_search.errors import ConfigError
from moa_search.formats import Plan
from moa_search.formats.files import atomic_write
from moa_search.formats.provenance import Budget
from moa_search.search.budgets import BudgetSpec

PLAN_FILE = re.compile(r"plan-(\d+)\.json")


@dataclass(frozen=True)
class BudgetUse:
    """One budget of a search.

    Attributes:
        asked: What must not be exceeded.
        used: What the chosen plan uses of it, in the user's unit.
    """

    asked: BudgetSpec
    used: str


@dataclass(frozen=True)
class Front:
    """Plans of which none beats another: under one set of budgets, or one for each of several.

    Attributes:
        plans: Under one set of budgets the first has the weights asked for, or equal ones on every profiled length.
        chosen_index: Which plan to use unless there is a reason to prefer another; None where none was chosen.
        usage: The budgets with what the chosen plan uses of them. Plans don't say it, so a front that was loaded
            doesn't know it, nor the two that follow.
        asked: The share of tokens or bytes that each plan may keep at most, increasing; empty under one set of budgets.
        has_knee: Whether the chosen one is the knee of the losses over ``asked``.
        numbers: Of the plans' files; by default from 0 on.
    """

    plans: Sequence[Plan]
    chosen_index: int | None = 0
    usage: Sequence[BudgetUse] = ()
    asked: tuple[float, ...] = ()
    has_knee: bool = False
    numbers: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", tuple(self.numbers) or tuple(range(len(self.plans))))

    @property
    def chosen(self) -> Plan:
        """The plan to use.

        Raises:
            ConfigError: None was chosen.
        """
        if self.chosen_index is None:
            raise ConfigError("no plan of the front is chosen; choose one with moa-search validate")
        return self.plans[self.chosen_index]

    @property
    def budgets(self) -> list[Budget]:
        """The upper bounds that the chosen plan keeps."""
        return list(self.chosen.provenance.budgets) if self.chosen.provenance else []

    @property
    def names(self) -> list[str]:
        """What the plans are called, ``00`` and so on."""
        return [f"{number:02d}" for number in self.numbers]

    @property
    def files(self) -> list[str]:
        """Where a folder holds the plans, ``front/plan-00.json`` and so on."""
        return [f"front/plan-{name}.json" for name in self.names]

    def is_chosen(self, index: int) -> bool:
        """Whether the plan at ``index`` acts as the chosen one does."""
        return self.chosen_index is not None and self.plans[index].fingerprint == self.chosen.fingerprint

    def rows(self) -> list[dict[str, Any]]:
        """One row per plan: its file, and density, attention density and predicted loss at each length.

        Where some plan stores fewer than 16 bits also the share of a 16-bit cache's bytes.
        """
        coded = not all(plan.is_plain for plan in self.plans)
        rows = []
        for file, plan in zip(self.files, self.plans, strict=True):
            row: dict[str, Any] = {"plan": Path(file).name}
            for metrics in plan.predicted:
                row[f"density@{metrics.length}"] = metrics.density
                row |= {f"share@{metrics.length}": plan.share(metrics.length)} if coded else {}
                row[f"attention_density@{metrics.length}"] = metrics.attention_density
                row[f"loss@{metrics.length}"] = metrics.loss
                row[f"loss_error@{metrics.length}"] = metrics.loss_error
            rows.append(row | {"gap": plan.provenance.gap if plan.provenance else None})
        return rows

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``plan.json``, ``front/plan-00.json`` ..., ``front/front.csv``; what belonged to an older front goes.

        Raises:
            ConfigError: The folder can't be written; older files stay as they were.
        """
        root = Path(folder)
        plans = {root / file: plan for file, plan in zip(self.files, self.plans, strict=True)}
        plans[root / "plan.json"] = self.chosen
        for path, plan in plans.items():
            plan.save_transforms(path.parent)
        contents = {path: plan.dumps() for path, plan in plans.items()}
        contents[root / "front" / "front.csv"] = self._csv()
        with contextlib.ExitStack() as all_or_none:
            for path, content in contents.items():
                file = all_or_none.enter_context(atomic_write(path))
                file.write(content.encode())
                file.flush()  # a full disk shows before the first file is replaced
        try:
            stale = [*(root / "front").glob("plan-*.json"), root / "front" / "budgets.png", root / "validation.csv"]
            for path in stale:
                if path not in contents:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: its older plans can't be removed ({error.strerror or error})") from None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Front:
        """The front in a folder that `save` wrote.

        Where plan.json is none of its plans it comes last, with the number that it would have; where there is no
        plan.json, none is chosen.

        Raises:
            ConfigError: The folder holds no front.
            PlanFormatError: A plan is damaged.
        """
        root = Path(folder)
        found = (root / "front").glob("plan-*.json")
        numbered = {int(match[1]): path for path in found if (match := PLAN_FILE.fullmatch(path.name))}
        if not numbered:
            raise ConfigError(f"{folder}: it holds no front/plan-*.json; give the folder that moa-search wrote to")
        numbers = sorted(numbered)
        plans = [Plan.load(numbered[number]) for number in numbers]
        if not (root / "plan.json").exists():
            return cls(plans, None, numbers=numbers)
        chosen = Plan.load(root / "plan.json")
        fingerprints = [plan.fingerprint for plan in plans]
        if chosen.fingerprint not in fingerprints:
            return cls([*plans, chosen], len(plans), numbers=[*numbers, numbers[-1] + 1])
        return cls(plans, fingerprints.index(chosen.fingerprint), numbers=numbers)

    def replaced(self, plans: Sequence[Plan], chosen_index: int | None) -> Front:
        """The same front with its plans as they are now, and another choice."""
        usage = self.usage if chosen_index == self.chosen_index else ()
        return dataclasses.replace(self, plans=plans, chosen_index=chosen_index, usage=usage)

    def _csv(self) -> str:
        rows = self.rows()
        text = io.StringIO()
        table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        return text.getvalue()
