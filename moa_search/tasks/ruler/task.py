"""RULER's tasks as tasks of this project."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.data.frames import plain_frame
from moa_search.data.samples import Sample
from moa_search.data.texts import documents, encode
from moa_search.errors import CalibrationError, ConfigError
from moa_search.formats.files import nearest, one_line
from moa_search.tasks.base import HELD_OUT_SEED, AnswerMode, Task
from moa_search.tasks.ruler.recipes import RECIPES, Texts, fitted
from moa_search.tasks.ruler.records import RulerRecord, read_records, string_match, written


class RulerTask(Task):
    """One of RULER's tasks, or the records of a file.

    Generated answers are scored as RULER and kvpress do, by the texts that they hold. Teacher-forced, the answer is
    those texts, and the score the share of its tokens ranked first.

    Args:
        data: RULER's name for a task, else a file in kvpress's layout (context, question, answer_prefix, answer,
            max_new_tokens, task), perhaps with ``?task=NAME`` after it for its records of one task.
    """

    metric = "token accuracy"
    at_depths = False

    def __init__(self, data: str) -> None:
        self._data = data
        self.name = f"ruler:{data}"
        self.data = "" if data in RECIPES else data.partition("?")[0]

    def metric_of(self, answers: AnswerMode) -> str:
        """See `Task.metric_of`."""
        return "string match" if answers == "generated" else self.metric

    def held_out(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """See `Task.held_out`; of a file, its first ``count`` records that fit, whatever the seed."""
        records = self._made if self._data in RECIPES else self._read
        return [sample_of(tokenizer, record, length, self.name) for record in records(tokenizer, length, count, seed)]

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`."""
        return float(correct.mean())

    def _made(self, tokenizer: Any, length: int, count: int, seed: int) -> list[RulerRecord]:
        texts = Texts(documents("test"))
        which = list(RECIPES).index(self._data)  # no two tasks ask for the same numbers
        records = []
        for number in range(count):
            record = fitted(
                RECIPES[self._data],
                texts,
                length,
                [HELD_OUT_SEED + seed, number, which],
                lambda record: _tokens(tokenizer, record),
            )
            if record is None:
                raise CalibrationError(f"{self.name} items can't be as short as {length} tokens")
            records.append(record)
        return records

    def _read(self, tokenizer: Any, length: int, count: int, seed: int) -> list[RulerRecord]:
        file, _, only = self._data.partition("?task=")
        records = [record for record in read_records(Path(file)) if only in ("", record.task)]
        fitting = [record for record in records if _tokens(tokenizer, record) <= length]
        if len(fitting) < count:
            raise ConfigError(
                f"{self._data} has {len(fitting)} records of at most {length} tokens, {count} are needed; ask for "
                "fewer samples or longer ones"
            )
        return fitting[:count]


def ruler_task(data: str) -> RulerTask:
    """The task of RULER's name, or over a file.

    Raises:
        ConfigError: It is neither.
    """
    file = Path(data.partition("?")[0])
    if data not in RECIPES and not file.is_file():
        raise ConfigError(
            f"task 'ruler:{one_line(data)}': RULER has no such task, and there is no such file"
            f"{nearest(data, RECIPES)}; choose from {', '.join(RECIPES)}, or give a file of its records"
        )
    return RulerTask(data)


def text_of(tokenizer: Any, given: Sequence[int]) -> str:
    """What a model wrote until it ended its answer; what follows an end token is none of it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        given: Token ids that it generated.
    """
    written = itertools.takewhile(lambda token: token != tokenizer.eos_token_id, given)
    return str(tokenizer.decode(list(written), skip_special_tokens=True))


def _parts(tokenizer: Any, record: RulerRecord) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens of the context, and of the question with the answer's beginning, encoded apart as kvpress does."""
    context = np.concatenate([plain_frame(tokenizer).before, encode(tokenizer, record.context)])
    return context, encode(tokenizer, record.question + record.answer_prefix)


def _tokens(tokenizer: Any, record: RulerRecord) -> int:
    """Tokens of a record with the room for its answer."""
    room = max(record.max_new_tokens, len(_reference(tokenizer, record)))
    return sum(map(len, _parts(tokenizer, record))) + room


def _reference(tokenizer: Any, record: RulerRecord) -> npt.NDArray[np.int64]:
    return encode(tokenizer, written(record))


def sample_of(tokenizer: Any, record: RulerRecord, length: int, name: str) -> Sample:
    """A record as an item of the task of a name, graded by its texts."""
    context, question = _parts(tokenizer, record)
    reference = _reference(tokenizer, record)

    def graded(given: npt.NDArray[np.int64]) -> float:
        return string_match(record.task, record.answer, text_of(tokenizer, given.tolist()))

    return Sample(
        np.concatenate([context, question, reference]),
        len(reference),
        name,
        0.5,
        record.task,
        length,
        question_tokens=len(question),
        room=record.max_new_tokens,
        grade=graded,
    )
