"""Calibration samples from any sources, with the data's answers or the dense model's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from moa_search.calibration.answers import ModelAnswers
from moa_search.data.frames import chat_frame, plain_frame
from moa_search.data.samples import Sample
from moa_search.data.sources import SourceSpec
from moa_search.data.store import load_samples, save_samples, tokenizer_hash
from moa_search.data.texts import SPLITS, Split
from moa_search.errors import ConfigError, FileFormatError, ModelMismatchError
from moa_search.formats.files import canonical_json, sha256_of
from moa_search.modeling.loading import weights_hash
from moa_search.modeling.source import cache_dir
from moa_search.parallel import ALONE, Workers
from moa_search.progress import progress
from moa_search.tasks.collecting import Answerer, DataAnswers, collect
from moa_search.tasks.drawing import Drawing
from moa_search.tasks.sources import parse_source
from moa_search.version import __version__

Answers = Literal["model", "dataset"]
Chat = Literal["auto", "never"]


@dataclass(frozen=True)
class Calibration:
    """Samples and where they come from.

    Attributes:
        samples: By length; within a length the sources take turns.
        dropped: For each source the items ``tried`` and the items ``kept``; the rest were answered wrongly.
        settings: How the samples were made, as JSON values; equal settings and data give equal samples.
    """

    samples: list[Sample]
    dropped: dict[str, dict[str, int]]
    settings: dict[str, Any]


def calibrate(
    model: Any,
    tokenizer: Any,
    *,
    sources: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    split: Split = "calibration",
    answers: Answers = "model",
    max_answer_tokens: int = 64,
    chat: Chat = "auto",
    workers: Workers = ALONE,
    cache: bool = True,
) -> Calibration:
    """Draw samples, have them answered, and keep those that are answered rightly.

    What is drawn doesn't depend on the model, and nothing depends on the number of workers. Items answered wrongly
    are replaced out of up to `tasks.collecting.ROUNDS` rounds of as many items.

    Args:
        model: The dense model; left as it was.
        tokenizer: Its tokenizer.
        sources: What to draw from; see `moa_search.tasks.sources`.
        lengths: Tokens per sample, the room for the answer included.
        samples: Samples per length.
        seed: Of everything drawn.
        split: Which documents to use; the splits share none.
        answers: ``model``: the model's greedy answers, kept where they are right or there is nothing to compare
            them with; copies as far as they are right; ``dataset``: the data's own.
        max_answer_tokens: Room for answers in the model's own words.
        chat: ``auto``: within the tokenizer's chat template, where it has one; ``never``: plain text.
        workers: Processes that share the answering.
        cache: Whether answers of the model are kept in the cache folder and used again.

    Raises:
        ConfigError: A source or an option can't be used, or data can't be read.
        CalibrationError: Samples can't be built as asked, or too few are answered rightly.
        FileFormatError: Samples that were saved before are damaged.
        ModelMismatchError: They were made with another tokenizer.
    """
    specs = _checked(sources, lengths, samples, seed, split, answers, chat, max_answer_tokens)
    in_chat = chat == "auto" and bool(tokenizer.chat_template)
    frame = chat_frame(tokenizer) if in_chat else plain_frame(tokenizer)
    room = max_answer_tokens if answers == "model" else None
    drawing = workers.together(
        lambda: Drawing(
            tokenizer, specs, lengths=lengths, count=samples, seed=seed, split=split, frame=frame, free_room=room
        )
    )
    settings: dict[str, Any] = {
        "sources": [spec.typed for spec in specs],
        "answers": answers,
        "chat": in_chat,
        "split": split,
        "seed": seed,
        "lengths": list(lengths),
        "samples_per_length": samples,
        "data": drawing.data,
    }
    if answers == "dataset":
        return _collected(drawing, DataAnswers(), settings, workers)
    settings["max_answer_tokens"] = max_answer_tokens

    def work() -> Calibration:
        return _collected(drawing, ModelAnswers(model, tokenizer, frame, workers), settings, workers)

    if not cache:
        return work()
    parts = [__version__, drawing.fingerprint, tokenizer_hash(tokenizer), weights_hash(model)]
    key = sha256_of(canonical_json(settings), *(part.encode() for part in parts)).removeprefix("sha256:")
    return _cached(cache_dir() / "calibration" / key, tokenizer, split, workers, work)


def _collected(drawing: Drawing, answer: Answerer, settings: dict[str, Any], workers: Workers) -> Calibration:
    total = len(drawing.turns) * sum(drawing.saved)
    with progress(what="Calibrating", unit="token", total=total, show=workers.is_first) as bar:
        samples, answered = collect(drawing, answer, bar.update)
    return Calibration(samples, answered, {**settings, "answered": answered})


def _cached(
    entry: Path, tokenizer: Any, split: Split, workers: Workers, work: Callable[[], Calibration]
) -> Calibration:
    """What is kept at ``entry``, else the result of ``work``, which the first process keeps there."""
    workers.together(lambda: _require_writable(entry.parent))
    found = workers.everywhere(_read(entry, tokenizer) if workers.is_first else None)[0]
    if found is not None:
        return found
    made = work()
    workers.by_first(
        lambda: save_samples(made.samples, entry, tokenizer, split=split, settings=made.settings, replace=True)
    )
    return made


def _read(entry: Path, tokenizer: Any) -> Calibration | None:
    """The result kept at ``entry``; None where there is none, or a damaged one, which is made anew."""
    if not entry.exists():
        return None
    try:
        stored = load_samples(entry, tokenizer)
        return Calibration(stored.samples, stored.settings["answered"], stored.settings)
    except (FileFormatError, ModelMismatchError, ConfigError, KeyError):
        return None


def _require_writable(folder: Path) -> None:
    """Find out before the work, not after, that its result can't be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache folder {folder} can't be made ({error.strerror}); set MOA_SEARCH_CACHE to a folder of yours"
        ) from error


def _checked(
    sources: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    split: str,
    answers: str,
    chat: str,
    max_answer_tokens: int,
) -> list[SourceSpec]:
    """The parsed sources.

    Raises:
        ConfigError: One of them or another option can't be used.
    """
    options = (("answers", answers, get_args(Answers)), ("chat", chat, get_args(Chat)), ("split", split, SPLITS))
    for option, value, known in options:
        if value not in known:
            raise ConfigError(f"{option}: {value!r} is unknown; choose from {', '.join(known)}")
    if not sources:
        raise ConfigError("sources: there is none; name at least one, such as passkey")
    for option, values in (("sources", sources), ("lengths", lengths)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{option}: {', '.join(map(str, values))} names one twice")
    least = {"lengths": min(lengths, default=0), "samples": samples, "max_answer_tokens": max_answer_tokens}
    for option, number in least.items():
        if number < 1:
            raise ConfigError(f"{option}: {number} is out of range; it must be at least 1")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be at least 0")
    return [parse_source(text) for text in sources]
