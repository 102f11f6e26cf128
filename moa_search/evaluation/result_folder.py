"""Results that were measured before, one small file each, in a folder that several processes may share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moa_search.errors import ConfigError
from moa_search.formats.files import atomic_write, canonical_json, parse_json, sha256_of
from moa_search.version import __version__


class ResultFolder:
    """Results by key.

    Every file is written at once and whole, so that processes can share a folder without locks: at worst two measure
    the same, and write the same. A file that is damaged, foreign or of another version of this library counts as
    absent, and the next measurement replaces it.

    Args:
        folder: Where the files are, made with the first of them.
        schema: Of the files.
        what: Name of the result in a file.

    Raises:
        ConfigError: The folder can't be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, schema: str, what: str) -> None:
        self._folder = Path(folder)
        self._schema = schema
        self._what = what
        there = next(path for path in (self._folder.absolute(), *self._folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(f"{folder}: this folder for measured {what} can't be made, {there} is a file")
        if not os.access(there, os.W_OK):
            raise ConfigError(f"{folder}: this folder for measured {what} can't be written")

    def read(self, key: Mapping[str, Any]) -> Any:
        """The result kept for ``key``, a JSON value; None where there is none.

        Args:
            key: What the result depends on, as JSON values; ``plan`` and ``length`` among them, which files are named
                after.
        """
        try:
            content = parse_json(self._path(key).read_bytes())
            result = content[self._what]
            whole = content.pop("checksum") == sha256_of(canonical_json(content))
            return result if whole and content == self._described(key) | {self._what: result} else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def write(self, key: Mapping[str, Any], result: Any) -> None:
        """Keep a result; see `read`.

        Raises:
            ConfigError: Its file can't be written.
        """
        content = self._described(key) | {self._what: result}
        with atomic_write(self._path(key)) as file:
            file.write(canonical_json(content | {"checksum": sha256_of(canonical_json(content))}) + b"\n")

    def _path(self, key: Mapping[str, Any]) -> Path:
        digest = sha256_of(canonical_json(self._described(key))).removeprefix("sha256:")[:24]
        return self._folder / f"{key['plan'].removeprefix('sha256:')[:12]}-{key['length']}-{digest}.json"

    def _described(self, key: Mapping[str, Any]) -> dict[str, Any]:
        """What a file says of its key; another version of this library may compute something else under one plan."""
        return {"schema": self._schema, "library_version": __version__, **key}
