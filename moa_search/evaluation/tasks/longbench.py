"""Records in LongBench's format, in a file of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.calibration import Sample, hash_samples
from moa_search.calibration.answers import stop_tokens
from moa_search.calibration.prompts import Frame, plain_frame
from moa_search.calibration.texts import encode
from moa_search.errors import CalibrationError, ConfigError
from moa_search.evaluation.scoring import generate_tokens
from moa_search.evaluation.tasks.base import HELD_OUT_SEED, Answers, Reading, Task
from moa_search.evaluation.tasks.text_scores import TEXT_SCORES
from moa_search.formats.files import canonical_json, one_line, parse_json, sha256_of

__all__ = ["LongBenchTask"]


@dataclass(frozen=True)
class _Kind:
    """How records of one data set are asked and scored.

    Attributes:
        metric: One of `TEXT_SCORES`.
        new_tokens: Room for the answer.
        question: Before a record's ``input``.
        lead: Before the answer.
        first_line: Whether only the first line of an answer counts.
    """

    metric: str
    new_tokens: int
    question: str = "\n\nQuestion: "
    lead: str = "\nAnswer:"
    first_line: bool = False


_GO_ON: dict[str, Any] = {"question": "\n", "lead": "", "first_line": True}
_SUMMARY: dict[str, Any] = {"question": "\n\n", "lead": "\nSummary:"}

KINDS: dict[str, _Kind] = {
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), _Kind("F1", 32)),
    **dict.fromkeys(("narrativeqa", "qasper"), _Kind("F1", 128)),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh"), _Kind("F1", 64)),
    "triviaqa": _Kind("F1", 32, **_GO_ON),
    "dureader": _Kind("ROUGE-L", 128),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), _Kind("ROUGE-L", 512, **_SUMMARY)),
    "samsum": _Kind("ROUGE-L", 128, **_GO_ON),
    **dict.fromkeys(("trec", "lsht"), _Kind("class named", 64, **_GO_ON)),
    **dict.fromkeys(("passage_retrieval_en", "passage_retrieval_zh", "passage_count"), _Kind("number named", 32)),
    **dict.fromkeys(("lcc", "repobench-p"), _Kind("edit similarity", 64, question="", lead="")),
}
"""LongBench's data sets; records of others are questions scored by F1."""

OTHER = _Kind("F1", 64)


@dataclass(frozen=True, eq=False)
class _Asked(Sample):
    """A record as a prompt; its supervised answer is the first accepted one.

    Attributes:
        accepted: Accepted answers.
        classes: All classes, where an answer names one.
    """

    accepted: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


class LongBenchTask(Task):
    """A question about a long text, answered freely and scored as LongBench does; forced, its loss is measured.

    The prompts' wording is this library's, so that scores are for comparing variants of one model with each other, not
    with published ones. A context that is too long loses its middle.

    Args:
        data: A ``.jsonl`` file of records of one data set, with ``context``, ``input``, ``answers``, ``dataset`` and,
            where an answer names a class, ``all_classes``.

    Raises:
        ConfigError: The file can't be read, or a line is no such record.
    """

    at_depths = False

    def __init__(self, data: str) -> None:
        self.name = f"longbench:{data}"
        self._records = _read(Path(data).expanduser())
        dataset = str(self._records[0].get("dataset", "")).removesuffix("_e")
        self._kind = KINDS.get(dataset, OTHER)
        self.metric = self._kind.metric

    def build(
        self, tokenizer: Any, *, length: int, count: int, seed: int, depths: Sequence[float] = ()
    ) -> list[Sample]:
        """See `Task.build`; items whose context is short stay short."""
        if len(self._records) < count:
            raise ConfigError(f"task {self.name!r}: the file has {len(self._records)} records, {count} are asked for")
        frame = plain_frame(tokenizer)
        order = np.random.default_rng(HELD_OUT_SEED + seed).permutation(len(self._records))[:count]
        return [self._asked(tokenizer, frame, self._records[index], length) for index in order.tolist()]

    def score(self, correct: npt.NDArray[np.bool_]) -> float:
        """See `Task.score`; of a forced answer, the share of its tokens ranked first."""
        return float(correct.mean())

    def metric_of(self, answers: Answers) -> str:
        """See `Task.metric_of`."""
        return self.metric if answers == "generated" else "token accuracy"

    def identity(self, samples: Sequence[Sample]) -> str:
        """See `Task.identity`."""
        scored = [[sample.accepted, sample.classes] for sample in samples if isinstance(sample, _Asked)]
        return sha256_of(hash_samples(samples).encode(), canonical_json(scored))

    def measure(self, model: Any, tokenizer: Any, sample: Sample, answers: Answers) -> list[Reading]:
        """See `Task.measure`."""
        if answers == "forced":
            return super().measure(model, tokenizer, sample, answers)
        assert isinstance(sample, _Asked)
        stops = tuple(stop_tokens(model, tokenizer, plain_frame(tokenizer)))
        given = generate_tokens(model, sample.prompt, self._kind.new_tokens, stops)
        text = str(tokenizer.decode(given, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if self._kind.first_line:
            text = text.lstrip("\n").partition("\n")[0]
        scored = TEXT_SCORES[self.metric]
        score = max(scored(text, wanted, sample.classes) for wanted in sample.accepted)
        return [Reading(sample.depth, float("nan"), score)]

    def _asked(self, tokenizer: Any, frame: Frame, record: dict[str, Any], length: int) -> Sample:
        kind = self._kind
        accepted = tuple(map(str, record["answers"]))
        end = encode(tokenizer, f"{kind.question}{record['input']}{kind.lead}" if record["input"] else kind.lead)
        context = encode(tokenizer, record["context"])
        reference = encode(tokenizer, f" {accepted[0]}" if kind.lead else accepted[0])[: kind.new_tokens]
        room = length - len(frame.before) - len(end) - kind.new_tokens
        if room < 1:
            raise CalibrationError(f"{self.name} items can't be as short as {length} tokens")
        if len(context) > room:
            head = (room + 1) // 2
            context = np.concatenate([context[:head], context[len(context) - (room - head) :]])
        ids = np.concatenate([frame.before, context, end, reference])
        classes = tuple(map(str, record.get("all_classes") or ()))
        name = str(record.get("_id", ""))
        return _Asked(ids, len(reference), self.name, 0.5, name, length, accepted=accepted, classes=classes)


def _read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, checked."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task 'longbench:{path}': the file can't be read ({one_line(error)})") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ConfigError(f"{where}: no JSON ({one_line(error)})") from None
        if not isinstance(record, dict) or not isinstance(record.get("context"), str):
            raise ConfigError(f"{where}: no record of LongBench, it has no text 'context'")
        if not isinstance(record.get("input"), str):
            raise ConfigError(f"{where}: no record of LongBench, it has no text 'input'")
        answers = record.get("answers")
        if not isinstance(answers, list) or not answers or not all(str(answer).strip() for answer in answers):
            raise ConfigError(f"{where}: no record of LongBench, its 'answers' are no list of texts")
        records.append(record)
    if not records:
        raise ConfigError(f"task 'longbench:{path}': the file has no records")
    if len({record.get("dataset") for record in records}) > 1:
        raise ConfigError(f"task 'longbench:{path}': its records are of several data sets; give one file for each")
    return records
