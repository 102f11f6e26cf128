"""RULER's records as kvpress lays them out, and its score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moa_search.data.rows import READERS, Rows, ending
from moa_search.errors import ConfigError

COLUMNS = ("context", "question", "answer_prefix", "answer", "max_new_tokens", "task")


@dataclass(frozen=True)
class RulerRecord:
    """One row of a data set such as ``simonjegou/ruler``.

    Attributes:
        context: What can be read before the question is known.
        question: About it.
        answer_prefix: How the answer begins.
        answer: Texts that it should hold.
        max_new_tokens: Room for it.
        task: RULER's name, such as ``niah_single_1``.
    """

    context: str
    question: str
    answer_prefix: str
    answer: tuple[str, ...]
    max_new_tokens: int
    task: str

    def row(self) -> dict[str, Any]:
        """By the names of `COLUMNS`, as a parquet file holds it."""
        return {**asdict(self), "answer": list(self.answer)}


def numbered(words: Sequence[str]) -> str:
    """Words as a list in one line: ``1. one 2. two``."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def written(record: RulerRecord) -> str:
    """An answer that holds all that it should, in the form of the worked example where the task has one."""
    if record.task == "cwe":
        return f" {numbered(record.answer)}"
    return f" {(' ' if record.task == 'vt' else ', ').join(record.answer)}"


def string_match(task: str, answer: Sequence[str], given: str) -> float:
    """RULER's score of one answer, 0 to 1: letters' case aside, how many of the texts it holds; of QA, whether any.

    Args:
        task: RULER's name.
        answer: Texts that the answer should hold.
        given: What the model wrote.
    """
    found = [text.lower() in given.lower() for text in answer]
    return float(any(found)) if task.startswith("qa") else sum(found) / len(found)


def read_records(path: Path) -> list[RulerRecord]:
    """Records of a file in kvpress's layout.

    Raises:
        ConfigError: The file can't be read, a column is missing, or a row isn't one of RULER's.
    """
    if ending(path) not in READERS:
        raise ConfigError(f"{path}: RULER's records are read from {', '.join(READERS)} files")
    try:
        rows = READERS[ending(path)](path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error})") from None
    missing = [name for name in COLUMNS if name not in rows.columns]
    if missing:
        raise ConfigError(f"{path}: column {missing[0]} is missing; RULER's files have {', '.join(COLUMNS)}")
    columns = [rows.column(name) for name in COLUMNS]
    return [_record(rows, index, cells) for index, cells in enumerate(zip(*columns, strict=True))]


def _record(rows: Rows, index: int, cells: Sequence[Any]) -> RulerRecord:
    context, question, prefix, answer, room, task = cells
    texts = (context, question, prefix, task)
    if not all(isinstance(text, str) for text in texts) or not context:
        raise ConfigError(f"{rows.place(index)}: context, question, answer_prefix and task must be texts")
    answers = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)
    if answer is None or not answers or not all(answers):
        raise ConfigError(f"{rows.place(index)}: answer must be a list of texts")
    try:
        count = int(room)
    except (TypeError, ValueError):
        count = 0
    if count < 1:
        raise ConfigError(f"{rows.place(index)}: max_new_tokens must be a positive number")
    return RulerRecord(context, question, prefix, answers, count, task)
