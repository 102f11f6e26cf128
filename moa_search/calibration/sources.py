"""What a user types to name calibration data: ``[TASK:]DATA[?key=value&key=value]``.

* ``passkey``, ``multikey``, ``copy``, ``question``: a built-in task over the standard library's texts;
* ``passkey:DATA``: the same over other texts;
* ``records:DATA``, or ``DATA`` alone: question-answer records;
* ``samples:FOLDER``: samples that were saved before.

DATA is a local ``.jsonl``, ``.json``, ``.parquet``, ``.csv``, ``.tsv``, ``.txt`` or ``.md`` file, a pattern such as
``books/*.txt``, a folder, or a Hugging Face dataset id.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moa_search.calibration.generators import GENERATORS
from moa_search.errors import ConfigError
from moa_search.formats.files import nearest, one_line

__all__ = ["ROLES", "SourceSpec", "parse_source"]

TASKS = (*GENERATORS, "records", "samples")

ROLES: dict[str, tuple[str, ...]] = {
    "context": ("context", "passage", "document", "article", "text", "story"),
    "question": ("question", "query", "instruction", "input", "prompt"),
    "answer": ("answer", "answers", "output", "target", "response"),
    "text": ("text", "content", "document", "article", "context", "passage", "body", "story"),
}
"""What a column is for, and the names that are tried in this order where none is given."""


@dataclass(frozen=True)
class SourceSpec:
    """One source of calibration samples.

    Attributes:
        typed: What the user typed.
        task: A built-in task, ``records`` or ``samples``.
        data: File, pattern, folder or dataset id; empty for the standard library's texts.
        subset: Configuration of a Hugging Face dataset.
        split: Its split, such as ``train`` or ``train[:1000]``.
        columns: Names of columns by role; see `ROLES`.
    """

    typed: str
    task: str
    data: str = ""
    subset: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)


def parse_source(text: str) -> SourceSpec:
    """The source that ``text`` names.

    Raises:
        ConfigError: It names none; the message says what is wrong.
    """
    where = f"source {one_line(text)!r}"
    body, mark, query = text.partition("?")
    task, colon, data = body.partition(":")
    if not colon:
        task, data = (body, "") if body in TASKS else ("records", body)
    if task not in TASKS:
        raise ConfigError(f"{where}: task {task!r} is unknown{nearest(task, TASKS)}; choose from {', '.join(TASKS)}")
    if not data and (colon or task in ("records", "samples")):
        raise ConfigError(f"{where}: data is missing; write {task}: and a file, folder or dataset id")
    known = _keys(task, data)
    options: dict[str, str] = {}
    for part in query.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ConfigError(f"{where}: {part!r} is not key=value")
        if key not in known:
            takes = f"choose from {', '.join(known)}" if known else "it takes none"
            raise ConfigError(f"{where}: key {key!r} is unknown{nearest(key, known)}; {takes}")
        if key in options:
            raise ConfigError(f"{where}: key {key!r} stands twice")
        options[key] = value
    columns = {role: options[role] for role in ROLES if role in options}
    return SourceSpec(text, task, data, options.get("subset"), options.get("split", "train"), columns)


def _keys(task: str, data: str) -> tuple[str, ...]:
    if not data or task == "samples":
        return ()
    return ("subset", "split", *(("context", "question", "answer") if task == "records" else ("text",)))
