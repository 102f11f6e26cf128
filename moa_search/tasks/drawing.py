"""Items of several sources that take turns, drawn without asking a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moa_search.data.conversations import Conversation
from moa_search.data.frames import Frame
from moa_search.data.loading import Record, load_records, load_texts
from moa_search.data.samples import Sample, hash_samples
from moa_search.data.sources import SourceSpec
from moa_search.data.store import load_samples
from moa_search.data.texts import Split, TextSource
from moa_search.errors import CalibrationError, ConfigError
from moa_search.formats.files import canonical_json, nearest, sha256_of
from moa_search.tasks.base import DrawnTask
from moa_search.tasks.conversations import ConversationTask
from moa_search.tasks.items import Generator, Item
from moa_search.tasks.records import RecordTask
from moa_search.tasks.registry import SOURCE_TASKS
from moa_search.tasks.turns import draw_round, take_turns


class Drawing:
    """Draws items. Equal arguments draw equal items.

    Args:
        tokenizer: A Hugging Face tokenizer.
        sources: What to draw from; none twice.
        lengths: Tokens per item.
        count: Items per length and round.
        seed: At least 0.
        split: Which documents to use.
        frame: Tokens around prompts.
        free_room: Tokens kept for a model's own answers; None where the data's answers are taken.

    Raises:
        ConfigError: Data can't be read.
        CalibrationError: None of it belongs to the split, saved samples are too few or belong to another split, or a
            length is too short or too long.
    """

    def __init__(
        self,
        tokenizer: Any,
        sources: Sequence[SourceSpec],
        *,
        lengths: Sequence[int],
        count: int,
        seed: int,
        split: Split,
        frame: Frame,
        free_room: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._split: Split = split
        self._frame = frame
        self._free_room = free_room
        self._seed = seed
        self.turns = take_turns([source.typed for source in sources], count)
        self.data: dict[str, str] = {}
        """A hash of what each source holds for the split."""
        self._makers: dict[str, Generator] = {}
        self._saved: dict[str, list[Sample]] = {}
        for source in sources:
            self._open(source)
        self.saved = {length: self._of_length(length) for length in lengths}
        """By length and source, as many samples as are needed of those that were saved before."""
        self._first = {length: self._round(length, 0) for length in lengths}

    @property
    def drawn(self) -> dict[str, int]:
        """For each source that items are drawn from, how many a round."""
        return {name: self.turns.count(name) for name in self._makers}

    @property
    def fingerprint(self) -> str:
        """A hash of everything that is drawn at first, and so of texts, wording, template and tokenizer."""
        prompts = [
            item.prompt.tobytes() + item.reference.tobytes()
            for by_source in self._first.values()
            for items in by_source.values()
            for item in items
        ]
        saved = [hash_samples(samples) for by_source in self.saved.values() for samples in by_source.values()]
        return sha256_of(*prompts, *(digest.encode() for digest in saved))

    def round(self, length: int, number: int) -> dict[str, list[Item]]:
        """A round's items of each source, fewer where its records run out. Rounds have to be drawn in order.

        Raises:
            CalibrationError: ``length`` is too short or too long for a source.
        """
        return self._round(length, number) if number else self._first[length]

    def _round(self, length: int, number: int) -> dict[str, list[Item]]:
        turns = [name for name in self.turns if name in self._makers]
        return draw_round(self._makers, turns, length, self._seed, number)

    def _of_length(self, length: int) -> dict[str, list[Sample]]:
        found = {}
        for name, samples in self._saved.items():
            needed = self.turns.count(name)
            fitting = [sample for sample in samples if sample.target_length == length]
            if len(fitting) < needed:
                raise CalibrationError(
                    f"source {name!r} has {len(fitting)} samples of {length} tokens, {needed} are needed; "
                    "ask for fewer samples, or for lengths that it has"
                )
            found[name] = fitting[:needed]
        return found

    def _open(self, source: SourceSpec) -> None:
        name, label = source.typed, f"source {source.typed!r}"
        if source.task == "samples":
            stored = load_samples(source.data, self._tokenizer)
            if stored.split != self._split:
                raise CalibrationError(f"{label} holds samples of the {stored.split} split, not of {self._split}")
            self._saved[name], self.data[name] = stored.samples, hash_samples(stored.samples)
        elif source.task == "records":
            records = load_records(source, self._split, answers=self._free_room is None)
            self.data[name] = sha256_of(*(canonical_json(_content(record)) for record in records))
            task = self._task(source, records)
            self._makers[name] = self._maker(task, task.texts(self._tokenizer))
        else:
            texts = load_texts(source, self._split)
            self.data[name] = sha256_of(*(text.encode() for _, text in texts))
            filler = (
                TextSource(self._tokenizer, texts, f"the {self._split} texts of {label}", joint="\n\n")
                if source.data
                else TextSource.library(self._tokenizer, self._split)
            )
            self._makers[name] = self._maker(SOURCE_TASKS[source.task], filler)

    def _task(self, source: SourceSpec, records: Sequence[Record | Conversation]) -> DrawnTask:
        label, every_turn = f"source {source.typed!r}", source.turns == "all"
        conversations = [record for record in records if isinstance(record, Conversation)]
        if not conversations:
            return RecordTask([record for record in records if isinstance(record, Record)], label)
        if every_turn and self._free_room is not None:
            raise ConfigError(f"{label}: turns=all supervises the data's own answers; take --answers dataset")
        return ConversationTask(conversations, label, every_turn=every_turn)

    def _maker(self, task: DrawnTask, source: TextSource) -> Generator:
        return Generator(task, self._tokenizer, source, self._frame, self._free_room)


def _content(record: Record | Conversation) -> list[Any]:
    """What of a record its data's hash is over."""
    if isinstance(record, Record):
        return [record.context, record.question, *record.answers]
    return [list(record.messages), record.answer]


def build_samples(
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: int,
    split: Split,
    tasks: Sequence[str] = ("passkey", "copy"),
) -> list[Sample]:
    """``count`` samples of exactly ``length`` tokens, the tasks taking turns, depths uniform within each task.

    Plain text over the standard library's texts. The same arguments give the same samples.

    Raises:
        ConfigError: A task is unknown, there is none, or the seed is negative.
        CalibrationError: ``length`` is too short or too long for the texts.
    """
    if not tasks:
        raise ConfigError(f"no task is named; choose from {', '.join(SOURCE_TASKS)}")
    for task in tasks:
        if task not in SOURCE_TASKS:
            raise ConfigError(
                f"task {task!r} is unknown{nearest(task, SOURCE_TASKS)}; choose from {', '.join(SOURCE_TASKS)}"
            )
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be at least 0")
    source = TextSource.library(tokenizer, split)
    makers = {task: Generator(SOURCE_TASKS[task], tokenizer, source) for task in tasks}
    turns = take_turns(tasks, count)
    drawn = {task: iter(items) for task, items in draw_round(makers, turns, length, seed).items()}
    return [item.answered(item.reference) for item in (next(drawn[task]) for task in turns)]
