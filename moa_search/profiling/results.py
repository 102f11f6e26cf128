"""What profiling measured of each sample: kept in memory, and in a folder from which a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from moa_search.errors import ConfigError
from moa_search.formats.files import atomic_write

SETTINGS_FILE = "settings.json"
LOSS = "loss"


@dataclass(frozen=True)
class SampleResult:
    """One sample's measurements.

    Attributes:
        loss: Loss in nats per answer token, dense or under the plan that is profiled under.
        statistics: Each ``[layer, kv_head, bucket, window]``, float32; zero in native layers. Changes by codecs have a
            grid of their own.
        seconds: Time it took, not kept in the folder.
    """

    loss: float
    statistics: dict[str, npt.NDArray[np.float32]]
    seconds: float = 0.0


class Results:
    """Results by sample number.

    With a folder, every result becomes a file as soon as it is known, whole or not at all, so a run that is
    killed at any moment loses no finished sample; and memory holds none of them.

    Args:
        folder: Where to keep them; None for memory alone.
        settings: Everything that decides the numbers; a folder made with others isn't continued.
        resume: Take up what the folder holds; False starts anew.

    Raises:
        ConfigError: The folder belongs to a run with other settings (the message says which), or can't be used.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], *, resume: bool = True) -> None:
        self._folder, self._settings = folder, settings
        self._kept: dict[int, SampleResult] = {}
        self._done: set[int] = set()
        if folder is None:
            return
        if not resume:
            discard_results(folder)
        if (folder / SETTINGS_FILE).exists():
            _require_same(folder, settings)
            self._done = {number for number in self._files() if self._read(number) is not None}

    @property
    def numbers(self) -> list[int]:
        """Samples whose results are known, increasing."""
        return sorted(self._done)

    def put(self, results: dict[int, SampleResult]) -> None:
        """Keep results by sample number.

        Raises:
            ConfigError: The folder can't be written.
        """
        self._write_settings()
        for number, result in results.items():
            if self._folder is None:
                self._kept[number] = result
            else:
                tensors = {**result.statistics, LOSS: np.asarray([result.loss], dtype=np.float64)}
                with atomic_write(self._path(number)) as file:
                    file.write(save(tensors))
            self._done.add(number)

    def once(self, name: str, make: Callable[[], dict[str, npt.NDArray[np.float32]]]) -> dict[str, Any]:
        """What every sample's results depend on: made once, and taken from the folder by a run that goes on.

        Args:
            name: Of its file.
            make: Called if the folder doesn't hold it.

        Raises:
            ConfigError: The folder can't be written.
        """
        if self._folder is None:
            return make()
        path = self._folder / f"{name}.safetensors"
        with contextlib.suppress(OSError, SafetensorError):
            return dict(load_file(path))
        made = make()
        self._write_settings()
        with atomic_write(path) as file:
            file.write(save(made))
        return made

    def in_order(self) -> Iterator[SampleResult]:
        """Every result, by sample number: sums come out the same in whatever order they were measured."""
        for number in self.numbers:
            result = self._kept[number] if self._folder is None else self._read(number)
            if result is None:
                raise ConfigError(f"{self._path(number)}: it vanished or was damaged while profiling; run again")
            yield result

    def _write_settings(self) -> None:
        if self._folder is not None and not (self._folder / SETTINGS_FILE).exists():
            with atomic_write(self._folder / SETTINGS_FILE) as file:
                file.write(json.dumps(self._settings, indent=2, sort_keys=True).encode())

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"sample-{number:05d}.safetensors"

    def _files(self) -> list[int]:
        assert self._folder is not None
        return [int(path.stem.removeprefix("sample-")) for path in self._folder.glob("sample-?????.safetensors")]

    def _read(self, number: int) -> SampleResult | None:
        """A result from its file; None where a damaged disk left something else, so it is measured again."""
        try:
            with safe_open(self._path(number), framework="numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return SampleResult(float(tensors.pop(LOSS)[0]), tensors)
        except (OSError, SafetensorError, KeyError):
            return None


def _require_same(folder: Path, settings: dict[str, Any]) -> None:
    try:
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: its {SETTINGS_FILE} can't be read ({error}); delete the folder") from None
    wanted = json.loads(json.dumps(settings))
    before, now = _flat(found), _flat(wanted)
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    telling = [name for name in names if "hash" not in name]  # hashes follow from what they are of
    differing = [f"{name} was {_brief(before.get(name))}, is {_brief(now.get(name))}" for name in telling or names]
    if differing:
        raise ConfigError(
            f"{folder} holds an unfinished run with other settings: {'; '.join(differing)}. Go on with those, "
            "start anew with --resume false, or write elsewhere"
        )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, so that a message can name the one that differs."""
    if not isinstance(settings, dict) or not settings:
        return {prefix.removesuffix("."): settings}
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.")
    return flat


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def discard_results(folder: Path) -> None:
    """Remove the results of a run, finished or not.

    Raises:
        ConfigError: They can't be removed.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: can't be removed ({error.strerror or error}); delete it by hand") from error


def results_folder(output: str | os.PathLike[str]) -> Path:
    """Where an unfinished run keeps its results: beside the profile that it will write."""
    path = Path(output)
    return path.with_name(f"{path.name}.partial")
