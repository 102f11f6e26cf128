"""Texts and records out of files and Hugging Face data sets, one side of them at a time."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moa_search.calibration.generators import GENERATORS
from moa_search.calibration.records import Record
from moa_search.calibration.sources import ROLES, SourceSpec
from moa_search.calibration.texts import Document, Split, documents, of_split, squeezed
from moa_search.errors import CalibrationError, ConfigError
from moa_search.formats.files import nearest, one_line
from moa_search.modeling.loading import cache_dir

__all__ = ["load_records", "load_texts"]

SECTION_CHARACTERS = 4_000
"""A text file is cut at line ends into sections of about this size, so that one book has all three splits."""

TEXT_FILES = (".txt", ".md")

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "document"}),
    ".md": ("text", {"sample_by": "document"}),
}
"""How `datasets` reads a local file, by its ending."""


def load_texts(spec: SourceSpec, split: Split) -> tuple[Document, ...]:
    """The texts of one split that a built-in task hides things in.

    Raises:
        ConfigError: The data can't be read, or lacks the column.
        CalibrationError: None of it belongs to the split.
    """
    if not spec.data:
        return documents(split)
    rows = _rows(spec)
    column = _column(spec, rows, "text")
    books = _builder(spec, f"source {spec.typed!r}")[0] == "text"
    texts: list[Document] = []
    for number, value in enumerate(rows[column]):
        name, text = f"{spec.data}#{number}", _text(value, spec, column)
        if books:
            texts += [(f"{name}.{part}", section) for part, section in enumerate(_sections(text))]
        else:
            texts.append((name, text))
    return _side(texts, spec, split)


def load_records(spec: SourceSpec, split: Split, *, answers: bool) -> tuple[Record, ...]:
    """The question-answer records of one split. A context's side is that of all its questions.

    Rows with an empty context or question are left out, and so are those with an empty answer.

    Args:
        spec: The source.
        split: Which side.
        answers: Whether a column of answers has to be there.

    Raises:
        ConfigError: The data can't be read, or lacks a column.
        CalibrationError: None of it belongs to the split.
    """
    rows = _rows(spec)
    columns = {role: _column(spec, rows, role) for role in ("context", "question")}
    answer = _column(spec, rows, "answer", needed=answers or "answer" in spec.columns)
    wanted = [*columns.values(), *([answer] if answer else [])]
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"source {spec.typed!r}: context, question and answer are not three columns: {wanted}")
    found: list[Record] = []
    names: dict[str, str] = {}
    for number, row in enumerate(rows.select_columns(wanted)):
        context, question = (_text(row[column], spec, column) for column in columns.values())
        accepted = _answers(row[answer], spec, answer) if answer else ()
        if context.strip() and question.strip() and (accepted or not answer):
            name = names.setdefault(squeezed(context), f"{spec.data}#{number}")
            found.append(Record(name, context, question.strip(), accepted))
    mine = dict(_side([(record.document, record.context) for record in found], spec, split))
    return tuple(record for record in found if record.document in mine)


def _side(texts: list[Document], spec: SourceSpec, split: Split) -> tuple[Document, ...]:
    """Those of one split, each text once; its content decides its side."""
    unique = {squeezed(text): (name, text) for name, text in reversed(texts) if text.strip()}
    mine = of_split(list(reversed(unique.values())), split, key=lambda name, text: squeezed(text))
    if not mine:
        raise CalibrationError(
            f"source {spec.typed!r} has {len(unique)} documents, none of them for {split}; give more of them"
        )
    return mine


def _rows(spec: SourceSpec) -> Any:
    """All rows, as a `datasets.Dataset`.

    Raises:
        ConfigError: They can't be read, or there are none.
    """
    import datasets  # type: ignore[import-untyped]
    import pyarrow  # type: ignore[import-untyped]

    where = f"source {spec.typed!r}"
    name, options = _builder(spec, where)
    if spec.subset is not None:
        options["name"] = spec.subset
    try:
        with _quiet(datasets):
            if name == "saved":
                rows = datasets.load_from_disk(str(Path(spec.data).expanduser()))
            else:
                rows = datasets.load_dataset(name, split=spec.split, **options)
    except (
        OSError, ValueError, KeyError, RuntimeError, ImportError, StopIteration,
        datasets.exceptions.DatasetsError, pyarrow.ArrowException,
    ) as error:  # fmt: skip
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = str(cause or error).strip().partition("\n")[0] or "it is empty"
        near = nearest(spec.data, GENERATORS) if spec.typed == spec.data else ""
        raise ConfigError(f"{where} can't be read: {one_line(reason)}{near}") from error
    if not isinstance(rows, datasets.Dataset):
        raise ConfigError(f"{where} holds several splits; give the folder of one of them: {', '.join(rows)}")
    if not len(rows):
        raise ConfigError(f"{where} has no rows")
    return rows


def _builder(spec: SourceSpec, where: str) -> tuple[str, dict[str, Any]]:
    """What ``load_dataset`` is given; ``saved`` stands for a folder that ``save_to_disk`` wrote."""
    path = Path(spec.data).expanduser()
    if (path / "state.json").is_file():
        return "saved", {}
    if path.is_dir():
        files = _text_files(path) if spec.split.startswith("train") else []
        if not files:
            return str(path), {"cache_dir": str(_cache())}
    else:
        files = [str(path)] if path.is_file() else sorted(glob.glob(str(path)))
    if not files and _looks_local(spec.data):
        raise ConfigError(f"{where}: {spec.data} doesn't exist")
    if not files:
        return spec.data, {}
    suffixes = {Path(file).suffix.lower() for file in files}
    unknown = sorted(suffixes - BUILDERS.keys())
    if unknown:
        raise ConfigError(f"{where}: {unknown[0] or 'a file without ending'} is not one of {', '.join(BUILDERS)}")
    if not (len(suffixes) == 1 or suffixes <= set(TEXT_FILES)):
        raise ConfigError(f"{where} holds files of several kinds ({', '.join(sorted(suffixes))}); name those of one")
    builder, options = BUILDERS[suffixes.pop()]
    return builder, {**options, "data_files": files, "cache_dir": str(_cache())}


def _text_files(folder: Path) -> list[str]:
    """The files under a folder that holds nothing but text; `datasets` alone would make every line a text."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [str(path) for path in files] if all(path.suffix.lower() in TEXT_FILES for path in files) else []


def _looks_local(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or "*" in data or Path(data).suffix in BUILDERS


def _cache() -> Path:
    """Where `datasets` keeps its copies of local files."""
    return cache_dir() / "datasets"


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars and no log lines: errors are reported in one line of our own."""
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _column(spec: SourceSpec, rows: Any, role: str, *, needed: bool = True) -> str:
    """The column for a role: the one the user named, else the first default there is, else nothing."""
    asked = spec.columns.get(role)
    names = ROLES[role] if asked is None else (asked,)
    found = next((name for name in names if name in rows.column_names), "")
    if not found and needed:
        near = nearest(asked, rows.column_names) if asked else ""
        raise ConfigError(
            f"source {spec.typed!r} has no column {' or '.join(names)}{near}; it has {', '.join(rows.column_names)}; "
            f"name one with {role}="
        )
    return found


def _text(value: Any, spec: SourceSpec, column: str) -> str:
    """A cell as text; a list's parts stand on lines of their own.

    Raises:
        ConfigError: It is neither text, a number nor a list of those.
    """
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    if isinstance(value, list):
        return "\n".join(_text(part, spec, column) for part in value)
    raise ConfigError(f"source {spec.typed!r}: column {column!r} holds {type(value).__name__} values, not text")


def _answers(value: Any, spec: SourceSpec, column: str) -> tuple[str, ...]:
    """Accepted answers in a cell: a text, a list of texts, or SQuAD's ``{"text": [...]}``."""
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    parts = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in (_text(part, spec, column).strip() for part in parts) if text))


def _sections(text: str) -> list[str]:
    """``text`` cut at line ends into parts of about `SECTION_CHARACTERS`."""
    sections: list[list[str]] = [[]]
    size = 0
    for line in text.splitlines(keepends=True):
        if size >= SECTION_CHARACTERS:
            sections.append([])
            size = 0
        sections[-1].append(line)
        size += len(line)
    return ["".join(lines) for lines in sections]
