"""What all workers of one study share, wherever they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.search.tuning.knobs import KnobSpace
from moa_search.search.tuning.storages import HEARTBEAT_SECONDS, Location
from moa_search.search.tuning.studies import keep_settings, open_study

if TYPE_CHECKING:
    from optuna import Study


@dataclass(frozen=True)
class Tuning:
    """What all workers of a study share.

    Attributes:
        space: The knobs.
        folder: Where the journal is and plans go.
        trials: Trials that end with values or without a feasible plan; workers that are at a trial when the last one
            ends finish theirs, too.
        settings: What values depend on, as JSON values by field: checksum of the profile, model, hash of the
            data, budgets, ...; going on with others is refused.
        storage: As in `moa_search.search.tuning.studies.open_study`.
        name: Name of the study in the storage.
        sampler: One of `moa_search.search.tuning.studies.SAMPLERS`.
        seed: Seed of the sampler.
        workers: Processes on this machine.
        with_cost: Whether a plan's cost is a second objective.
        heartbeat_seconds: Time between signs of life in a database.
    """

    space: KnobSpace
    folder: Path
    trials: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    storage: str | None = None
    name: str = "tune"
    sampler: str = "tpe"
    seed: int = 0
    workers: int = 1
    with_cost: bool = False
    heartbeat_seconds: int = HEARTBEAT_SECONDS

    def open(self, worker: int = 0) -> Study:
        """Open the study, or make it, and check that it was made with these settings.

        Raises:
            ConfigError: As `open_study` and `keep_settings` do.
        """
        study = open_study(
            self.storage,
            self.folder,
            self.name,
            ["minimize"] * (1 + self.with_cost),
            self.sampler,
            self.seed,
            worker=worker,
            workers=self.workers,
            heartbeat_seconds=self.heartbeat_seconds,
        )
        space = self.space
        shared = {
            "objectives": ["loss", "cost"] if self.with_cost else ["loss"],
            "lengths that count": list(space.lengths),
            "criteria": list(space.criteria),
            "fixed knobs": dict(space.fixed),
            "densities": None if space.densities is None else list(space.densities),
        }
        keep_settings(study, {**shared, **self.settings})
        return study

    @property
    def location(self) -> Location:
        """Where the study is kept."""
        return Location.parse(self.storage, self.folder)

    def plan_path(self, fingerprint: str) -> Path:
        """File of a plan that was decoded."""
        return self.folder / "plans" / f"{fingerprint.removeprefix('sha256:')[:16]}.json"
