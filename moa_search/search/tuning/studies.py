"""Studies of the outer loop: opened, checked against the settings they were made with, and sampled."""

from __future__ import annotations

import json
import os
import socket
import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from moa_search.errors import ConfigError
from moa_search.formats.files import one_line
from moa_search.search.tuning.quiet import quiet
from moa_search.search.tuning.storages import HEARTBEAT_SECONDS, Location, open_storage

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler

Direction = Literal["minimize", "maximize"]

SAMPLERS = ("tpe", "gp", "random")

SETTINGS = "settings"
"""User attribute of a study: what its trials' values depend on."""


def open_study(
    storage: str | None,
    folder: str | os.PathLike[str],
    name: str,
    directions: Sequence[Direction],
    sampler: str = "tpe",
    seed: int = 0,
    *,
    worker: int = 0,
    workers: int = 1,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> Study:
    """Open a study, or make it.

    Args:
        storage: Path of a journal or URL of a database; None for a journal in ``folder``.
        folder: The study's folder.
        name: Name of the study in its storage.
        directions: ``minimize`` or ``maximize`` per objective.
        sampler: One of `SAMPLERS`.
        seed: Seed of the sampler; workers and resumed runs draw other numbers from it.
        worker: Place of this process among the workers.
        workers: Processes that will use the study at the same time.
        heartbeat_seconds: Time between signs of life in a database.

    Raises:
        ConfigError: The storage can't be used, or not by several workers, or keeps a study of that name with other
            objectives; the sampler is unknown or lacks a package.
    """
    import optuna

    location = Location.parse(storage, folder)
    if location.kind == "sqlite" and workers > 1:
        raise ConfigError(
            f"{location.shown} can't serve {workers} workers: SQLite let two of them claim the same trial; "
            "use the default journal on one machine, PostgreSQL on many"
        )
    opened = open_storage(location, heartbeat_seconds=heartbeat_seconds)
    with quiet():
        study = optuna.create_study(storage=opened, study_name=name, directions=[*directions], load_if_exists=True)
        found = [direction.name.lower() for direction in study.directions]
        if found != list(directions):
            raise ConfigError(
                f"{location.shown}: the study {name!r} has {len(found)} objectives to {'/'.join(found)}, "
                f"not {len(directions)} to {'/'.join(directions)}; give the new one another name"
            )
        entropy = [seed, worker, len(study.get_trials(deepcopy=False))]
        if location.kind == "postgresql":  # workers of other machines are counted from 0 too
            entropy += [zlib.crc32(socket.gethostname().encode()), os.getpid()]
        study.sampler = _sampler(sampler, entropy)
    return study


def keep_settings(study: Study, settings: Mapping[str, Any]) -> None:
    """Store what the trials' values depend on, or check that it is what the study was made with.

    Args:
        study: The study.
        settings: JSON values by field.

    Raises:
        ConfigError: A field differs, or the study has trials that nobody knows the settings of.
    """
    wanted: dict[str, Any] = json.loads(json.dumps(dict(settings), allow_nan=False))
    has_trials = bool(study.get_trials(deepcopy=False))  # read first: another machine stores settings before trials
    found = study.user_attrs.get(SETTINGS)
    if found is None:
        if has_trials:
            raise ConfigError(f"the study {study.study_name!r} wasn't made by moa-search tune; give another name")
        study.set_user_attr(SETTINGS, wanted)
        return
    for field in dict.fromkeys([*found, *wanted]):
        if found.get(field) != wanted.get(field):
            raise ConfigError(
                f"the study {study.study_name!r} was made with {field} {one_line(json.dumps(found.get(field)))}, not "
                f"{one_line(json.dumps(wanted.get(field)))}; go on with the same, or give the new study another name"
            )


def _sampler(name: str, entropy: list[int]) -> BaseSampler:
    """A sampler that draws what no other worker and no earlier run of this study has drawn."""
    import numpy as np
    import optuna

    if name not in SAMPLERS:
        raise ConfigError(f"sampler {name!r} is unknown; choose from {', '.join(SAMPLERS)}")
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if name == "tpe":
        # Optuna 5's defaults are meant for this: multivariate with one objective, and workers that keep away from
        # what others are just trying (constant liar).
        return optuna.samplers.TPESampler(seed=seed)
    missing = [package for package in ("scipy", "torch") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"the sampler gp needs {missing[0]}; pip install {missing[0]}, or take tpe")
    return optuna.samplers.GPSampler(seed=seed)
