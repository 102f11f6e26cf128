"""The rows of one file, as the file has them.

No type is inferred: a CSV cell is its text, a JSON number its digits. Nothing is cached: what is read is what the file
holds now. What can't be read for certain is refused, with its line.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from moa_search.errors import ConfigError
from moa_search.formats.files import one_line

FIELD_CHARACTERS = 2**31 - 1
"""Longest CSV cell; the module's own limit is 128 Ki, less than a long document."""

BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""What the first bytes say about an encoding, the longer ones first."""


@dataclass(frozen=True)
class Rows:
    """Rows of a file.

    Attributes:
        file: What errors call the file.
        columns: Names of its columns.
        unit: What is numbered: ``line`` or ``row``.
        numbers: The number of each row, from 1.
        column: A column's cells by its name: text, None where there is nothing, a boolean, a list, or a mapping. Other
            types only where the file's format has them.
    """

    file: str
    columns: tuple[str, ...]
    unit: str
    numbers: Sequence[int]
    column: Callable[[str], Sequence[Any]]

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        return f"{self.file}, {self.unit} {self.numbers[index]}"


def ending(path: Path) -> str:
    """A file's ending that says what it holds: ``.jsonl`` of ``a.jsonl`` and of ``a.jsonl.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def read_text(path: Path) -> str:
    """A whole text file; every line end becomes a line feed.

    Raises:
        ConfigError: It isn't UTF-8.
        OSError: It can't be opened.
    """
    text = "".join(line for _, line in _lines(path))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, without a byte order mark.

    Raises:
        ConfigError: A line isn't UTF-8, or holds a NUL character.
    """
    for number, line in _raw_lines(path):
        if number == 1:
            encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if line.startswith(mark)), None)
            if encoding is not None:
                raise ConfigError(f"{path} is {encoding}; save it as UTF-8")
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ConfigError(f"{path}, line {number}: byte 0x{byte:02x} is not UTF-8; save it as UTF-8") from None
        if "\0" in text:
            raise ConfigError(f"{path}, line {number}: holds a NUL character; save it as UTF-8 text")
        yield number, text


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, decompressed where its ending says that it is compressed."""
    number = 0
    with COMPRESSED.get(path.suffix.lower(), Path.open)(path, "rb") as file:
        while True:
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise ConfigError(f"{path}: can't be read after line {number} ({one_line(error)})") from None
            if not line:
                return
            number += 1
            yield number, line


@contextlib.contextmanager
def _open_zstandard(path: Path, mode: str) -> Iterator[IO[bytes]]:
    import pyarrow  # type: ignore[import-untyped]

    with pyarrow.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as file:
        yield file


COMPRESSED: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".zst": _open_zstandard}
"""How compressed files are opened, by their last ending."""


def read_csv(path: Path, delimiter: str) -> Rows:
    """Every cell as it is written, quotes aside; the first line names the columns."""

    def pieces() -> Iterator[str]:
        for _, line in _lines(path):
            yield from io.StringIO(line, newline="")  # a lone \r ends a line, too

    found: list[list[str]] = []
    numbers: list[int] = []
    limit = csv.field_size_limit(FIELD_CHARACTERS)
    reader = csv.reader(pieces(), delimiter=delimiter, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                found.append(cells)
                numbers.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path}, line {line}: {one_line(error)}") from None
    finally:
        csv.field_size_limit(limit)
    if not found:
        raise ConfigError(f"{path} is empty")
    header = found[0]
    _require_unique(header, path)
    for number, cells in zip(numbers, found, strict=True):
        if len(cells) != len(header):
            raise ConfigError(f"{path}, line {number}: {len(cells)} cells under a header of {len(header)}")
    position = {name: index for index, name in enumerate(header)}
    return Rows(
        str(path), tuple(header), "line", numbers[1:], lambda name: [cells[position[name]] for cells in found[1:]]
    )


def _read_json(path: Path) -> Rows:
    """Objects one a line, or a list of them; numbers as they are written."""
    lines = ((number, text) for number, text in _lines(path) if text.strip())
    first = next(lines, None)
    if first is None:
        raise ConfigError(f"{path} is empty")
    if first[1].lstrip().startswith("["):
        whole = "".join(text for _, text in (first, *lines))
        listed = _parsed(whole, path, None)
        unit, numbered = "row", list(enumerate(listed, 1))
    else:
        unit, numbered = "line", []
        for number, text in (first, *lines):
            numbered.append((number, _parsed(text, path, number)))
    columns: dict[str, None] = {}
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, {unit} {number}: is no JSON object")
        columns.update(dict.fromkeys(row))
    return Rows(
        str(path),
        tuple(columns),
        unit,
        [number for number, _ in numbered],
        lambda name: [row.get(name) for _, row in numbered],
    )


def _parsed(text: str, path: Path, line: int | None) -> Any:
    """The value of one line, or of a whole file where there is no ``line``."""
    where = str(path) if line is None else f"{path}, line {line}"

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{where}: key {one_line(twice)!r} stands twice in one object")
        return content

    try:
        return json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=object_of)
    except json.JSONDecodeError as error:
        what = "a JSON value on one line" if line is not None else "JSON"
        raise ConfigError(f"{path}, line {line or error.lineno}: is not {what} ({error.msg})") from None
    except RecursionError:
        raise ConfigError(f"{where}: is nested too deeply") from None


def _read_parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    def read(name: str) -> Any:
        # One file, not a data set: its folders' names give it no columns.
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read([name])[name]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return arrow_rows(str(path), file.schema_arrow.names, file.metadata.num_rows, read)
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{path}: {one_line(str(error).partition(chr(10))[0])}") from None


def arrow_rows(file: str, columns: Sequence[str], count: int, read: Callable[[str], Any]) -> Rows:
    """Rows of Arrow columns, whose types are the file's own.

    Args:
        file: What errors call the file.
        columns: Names.
        count: Rows.
        read: The Arrow column of a name.

    Raises:
        ConfigError: Two columns have one name.
    """
    _require_unique(columns, file)
    return Rows(file, tuple(columns), "row", range(1, count + 1), lambda name: _cells(read(name)))


def _cells(column: Any) -> list[Any]:
    import pyarrow

    def has_short_floats(kind: Any) -> bool:
        if pyarrow.types.is_float16(kind) or pyarrow.types.is_float32(kind):
            return True
        return any(has_short_floats(kind.field(i).type) for i in range(kind.num_fields))

    def plain(scalar: Any) -> Any:
        value = scalar.as_py()
        if isinstance(value, float):
            short = np.float16 if pyarrow.types.is_float16(scalar.type) else np.float32
            return str(short(value)) if np.isfinite(value) and not pyarrow.types.is_float64(scalar.type) else value
        if isinstance(scalar, pyarrow.StructScalar) and value is not None:
            return {name: plain(scalar[name]) for name in scalar}
        if isinstance(value, list):
            return [plain(part) for part in scalar]
        return value

    # As Python's float, a float32 of 0.1 would be 0.10000000149011612.
    return [plain(scalar) for scalar in column] if has_short_floats(column.type) else list(column.to_pylist())


def _require_unique(names: Sequence[str], file: object) -> None:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise ConfigError(f"{file}: two columns are called {one_line(twice[0])!r}")


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": lambda path: read_csv(path, ","),
    ".tsv": lambda path: read_csv(path, "\t"),
}
"""How files of rows are read, by their ending."""

TEXT_FILES = (".txt", ".md")
"""Endings of files that are one text each."""
