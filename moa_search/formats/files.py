"""What file formats share: atomic writing, canonical hashing, checked arrays and one-line validation errors."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError, MoAError, PlanFormatError
from moa_search.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from pydantic import ValidationError

MESSAGE_CHARACTERS = 300
"""Longest text quoted from a file in an error."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty temporary file beside ``path`` that takes its place only when the block ends without error.

    Missing parent folders are made. An exception, ``KeyboardInterrupt`` included, leaves an older file as it
    was and removes the temporary one.

    Raises:
        ConfigError: The file can't be written there.
    """
    target = Path(path)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))  # before the work, not after
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        yield Path(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        if isinstance(error, OSError):
            raise ConfigError(f"{path}: can't be written ({error.strerror or error})") from error
        raise


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """`atomic_path`, opened for writing; raises what that does."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_csv(table: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a table without its index, atomically; raises what `atomic_write` does."""
    with atomic_write(path) as file:
        file.write(table.to_csv(index=False).encode())


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text in which every key is unique and every number finite.

    Raises:
        ValueError: It isn't such a text; the message says what is wrong and where.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite_float, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_plan_json(text: str | bytes, source: str) -> Any:
    """As `parse_json`, for plans of any format; ``source`` names the text in the error.

    Raises:
        PlanFormatError: It isn't such a text.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        kind = file_kind(text) if isinstance(text, bytes) else None
        if kind in MAKES_A_PLAN:  # not so a plan that is damaged
            raise PlanFormatError(f"{source}: it is a {kind}, no plan; {MAKES_A_PLAN[kind]}") from None
        raise PlanFormatError(f"{source}: not a JSON file, or a truncated one ({one_line(error)})") from None


def require_schema(
    schema: object, known: Sequence[str], source: object, foreign: type[MoAError], unknown: type[MoAError]
) -> None:
    """Check the schema that a file names.

    Args:
        schema: What the file says, if anything.
        known: Schemas that can be read, such as ``moa-plan/1``, of one kind of file.
        source: Names the file in errors.
        foreign: Raised where it is no file of that kind.
        unknown: Raised where it is one of another version.
    """
    kind, _, _ = known[0].partition("/")
    if not isinstance(schema, str) or not schema.startswith(f"{kind}/"):
        raise foreign(f'{source}: not a moa-search {kind.removeprefix("moa-")} (no "schema": "{known[0]}")')
    if schema not in known:
        raise unknown(f"{source}: schema {one_line(schema)} is unknown to moa-search {__version__}; upgrade it")


MAKES_A_PLAN = {
    "profile": "moa-search makes plans from it",
    "file of transforms": "give the plan beside it, a .json",
}


def file_kind(raw: bytes) -> str | None:
    """What the bytes of a file are of ours: a ``plan``, a ``profile`` or a ``file of transforms``; None if nothing."""
    if raw.lstrip()[:1] == b"{":
        return "plan" if b'"moa-plan/' in raw[:400] else None
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    kinds = {b"moa-profile/": "profile", b"moa-transforms/": "file of transforms"}
    return next((kind for schema, kind in kinds.items() if schema in header), None)


def sha256_of(*parts: bytes) -> str:
    """``sha256:`` and the hexadecimal digest of ``parts``, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def take_tensor(
    tensors: dict[str, npt.NDArray[Any]], name: str, shape: tuple[int, ...], dtype: type = np.float32
) -> npt.NDArray[Any]:
    """Take an array out of a file's.

    Raises:
        ValueError: It is missing, of another shape or type, or not finite.
    """
    if name not in tensors:
        raise ValueError(f"tensor {name} is missing")
    tensor = tensors.pop(name)
    if tensor.shape != shape:
        raise ValueError(f"tensor {name} has shape {tensor.shape}, expected {shape}")
    if tensor.dtype != dtype:
        raise ValueError(f"tensor {name} holds {tensor.dtype}, expected {np.dtype(dtype)}")
    if not np.isfinite(tensor).all():
        raise ValueError(f"tensor {name} holds values that aren't finite")
    return tensor


def nearest(word: str, known: Iterable[str]) -> str:
    """A `` (did you mean 'x'?)`` for the known word nearest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """A file's content.

    Raises:
        ConfigError: It can't be read; a folder's error names files in it, a wrong name's the nearest one there is.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        place, hint = Path(path), ""
        with contextlib.suppress(OSError):
            if place.is_dir():
                files = sorted(file.name for file in place.iterdir() if file.suffix in (".json", ".safetensors"))
                hint = f"; give a file in it, such as {files[0]}" if files else ""
            elif not place.exists():
                hint = nearest(place.name, (file.name for file in place.parent.iterdir() if file.is_file()))
        raise ConfigError(f"{one_line(path)}: {error.strerror or error}{hint}") from None


def one_line(text: object) -> str:
    """``text`` on one line that any terminal can print, cut to a readable length."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return escaped if len(escaped) <= MESSAGE_CHARACTERS else f"{escaped[:MESSAGE_CHARACTERS]}..."


def describe_invalid(error: ValidationError, known_keys: Iterable[str] = ()) -> str:
    """The first problem of a pydantic error as ``where: what``, on one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "top level"
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = f"unknown key{nearest(str(first['loc'][-1]), known_keys)}"
    more = error.error_count() - 1
    return f"{one_line(where)}: {one_line(what)}" + (f" (and {more} more)" if more else "")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{one_line(literal)} is too large a number")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key '{one_line(key)}' stands twice in one object")
        content[key] = value
    return content
