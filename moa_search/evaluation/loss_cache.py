"""Losses that were measured before, one small file each, in a folder that several processes may share."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from moa_search.errors import ConfigError
from moa_search.formats.files import atomic_write, canonical_json, parse_json, sha256_of
from moa_search.version import __version__

__all__ = ["DENSE_PLAN", "LOSSES_SCHEMA", "LossCache", "LossKey"]

LOSSES_SCHEMA: Final = "moa-losses/1"

DENSE_PLAN: Final = "dense"
"""Stands for the fingerprint of a plan where there is none."""


@dataclass(frozen=True)
class LossKey:
    """What losses depend on.

    Attributes:
        plan: Fingerprint of the plan, or `DENSE_PLAN`.
        weights: Hash of the model's weights.
        dtype: Their type.
        data: Hash of the samples.
        length: Tokens per sample.
    """

    plan: str
    weights: str
    dtype: str
    data: str
    length: int


class LossCache:
    """Losses per sample, by `LossKey`, in a folder or for this process alone.

    Every file is written at once and whole, so that processes can share a folder without locks: at worst two measure
    the same, and write the same. A file that is damaged, foreign or of another version of this library counts as
    absent, and the next measurement replaces it.

    Args:
        folder: Where the files are, made with the first of them; None keeps losses in memory only.

    Raises:
        ConfigError: The folder can't be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._known: dict[LossKey, tuple[float, ...]] = {}
        if self._folder is not None:
            _require_folder(self._folder)

    def get(self, key: LossKey, count: int) -> tuple[float, ...] | None:
        """The ``count`` losses kept for ``key``, in nats per answer token, or None."""
        if key not in self._known and self._folder is not None:
            found = _read(self._folder / _file_name(key), key)
            if found is not None:
                self._known[key] = found
        losses = self._known.get(key)
        return losses if losses is not None and len(losses) == count else None

    def put(self, key: LossKey, losses: Sequence[float]) -> None:
        """Keep the losses of all samples of ``key``, each a finite number.

        Raises:
            ConfigError: Their file can't be written.
        """
        self._known[key] = tuple(losses)
        if self._folder is not None:
            content = _described(key) | {"losses": list(losses)}
            with atomic_write(self._folder / _file_name(key)) as file:
                file.write(canonical_json(content | {"checksum": sha256_of(canonical_json(content))}) + b"\n")


def _described(key: LossKey) -> dict[str, Any]:
    """What a file says of its key; another version of this library may compute something else under one plan."""
    return {"schema": LOSSES_SCHEMA, "library_version": __version__, **asdict(key)}


def _file_name(key: LossKey) -> str:
    plan = key.plan.removeprefix("sha256:")[:12]
    digest = sha256_of(canonical_json(_described(key))).removeprefix("sha256:")[:24]
    return f"{plan}-{key.length}-{digest}.json"


def _read(path: Path, key: LossKey) -> tuple[float, ...] | None:
    """The losses in a file if it is whole and about ``key``."""
    try:
        content = parse_json(path.read_bytes())
        losses = content["losses"]
        whole = content.pop("checksum") == sha256_of(canonical_json(content))
        if not whole or content != _described(key) | {"losses": losses}:
            return None
        return tuple(losses) if all(isinstance(loss, float) and math.isfinite(loss) for loss in losses) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _require_folder(folder: Path) -> None:
    """Find out before the work, not after, that its result can't be kept; the first result makes the folder."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{folder}: this folder for measured losses can't be made, {there} is a file")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{folder}: this folder for measured losses can't be written")
