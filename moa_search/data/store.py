"""Samples on disk: a `datasets` data set that can be looked at, shared and profiled again."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moa_search.data.samples import Sample, hash_samples
from moa_search.data.texts import SPLITS, Split
from moa_search.errors import ConfigError, FileFormatError, ModelMismatchError
from moa_search.formats.files import canonical_json, one_line, parse_json, sha256_of
from moa_search.version import __version__

SCHEMA = "moa-samples/1"
METADATA = "moa-samples.json"
COLUMNS = ("ids", "answer_tokens", "target_length", "task", "source", "depth", "document")


@dataclass(frozen=True)
class StoredSamples:
    """What a folder of samples holds.

    Attributes:
        samples: In the order in which they were saved.
        split: The side that all of them belong to.
        settings: How they were made.
    """

    samples: list[Sample]
    split: Split
    settings: dict[str, Any]


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash over the tokens that a tokenizer's ids stand for."""
    return sha256_of(canonical_json(tokenizer.get_vocab()))


def require_samples_folder(folder: str | Path) -> None:
    """Check that samples can take a folder's place: there is none, or one of samples.

    Raises:
        ConfigError: It holds something else, or is no folder.
    """
    if Path(folder).exists() and not (Path(folder) / METADATA).is_file():
        raise ConfigError(f"{folder}: exists and holds no samples; give another folder")


def save_samples(
    samples: Sequence[Sample],
    folder: str | Path,
    tokenizer: Any,
    *,
    split: Split,
    settings: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write samples as a folder that ``datasets.load_from_disk`` opens, with their texts to read.

    The folder appears whole or not at all; an older one of samples is replaced.

    Args:
        samples: At least one.
        folder: Where to; its parents are made.
        tokenizer: That made the ids.
        split: The side that all of them belong to.
        settings: How they were made, as JSON values.
        replace: Whether whatever stands there now goes, rather than only samples.

    Raises:
        ConfigError: There are no samples, the folder holds something else, or it can't be written.
    """
    import datasets  # type: ignore[import-untyped]

    target = Path(folder)
    if not samples:
        raise ConfigError(f"{folder}: there are no samples to save")
    if not replace:
        require_samples_folder(target)
    columns: dict[str, list[Any]] = {name: [getattr(sample, name) for sample in samples] for name in COLUMNS}
    if any(sample.supervised is not None for sample in samples):
        columns["supervised"] = [sample.supervised for sample in samples]
    if any(sample.question_tokens for sample in samples):
        columns["question_tokens"] = [sample.question_tokens for sample in samples]
    columns["prompt"] = [_readable(tokenizer, sample.prompt) for sample in samples]
    columns["answer"] = [_readable(tokenizer, sample.answer) for sample in samples]
    metadata = {
        "schema": SCHEMA,
        "version": __version__,
        "split": split,
        "tokenizer": tokenizer_hash(tokenizer),
        "hash": hash_samples(samples),
        "settings": dict(settings or {}),
    }
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:64]}.", dir=target.parent) as scratch:
            made = Path(scratch) / "made"
            datasets.Dataset.from_dict(columns).save_to_disk(str(made))
            (made / METADATA).write_bytes(canonical_json(metadata))
            if target.exists():
                target.rename(Path(scratch) / "replaced")
            made.rename(target)
    except OSError as error:
        raise ConfigError(f"{folder}: can't be written ({error.strerror or error})") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def load_samples(folder: str | Path, tokenizer: Any) -> StoredSamples:
    """Samples that `save_samples` wrote.

    Args:
        folder: Where they are.
        tokenizer: Of the model they are for.

    Raises:
        ConfigError: There is no such folder.
        FileFormatError: It is damaged, foreign or from a newer version.
        ModelMismatchError: It was made with another tokenizer.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{folder}: no such folder of samples")
    try:
        metadata = parse_json((path / METADATA).read_bytes())
        if metadata["schema"] != SCHEMA:
            raise FileFormatError(
                f"{folder}: schema {one_line(metadata['schema'])} is unknown to moa-search {__version__}"
            )
        if metadata["tokenizer"] != tokenizer_hash(tokenizer):
            raise ModelMismatchError(f"{folder}: these samples were made with another tokenizer; make them anew")
        samples = _read(path)
        if metadata["split"] not in SPLITS or hash_samples(samples) != metadata["hash"]:
            raise ValueError("its data don't match their hash")
        return StoredSamples(samples, metadata["split"], dict(metadata["settings"]))
    except FileFormatError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = one_line(str(error).partition("\n")[0] or type(error).__name__)
        raise FileFormatError(f"{folder}: no folder of samples, or a damaged one ({reason})") from error


def _read(path: Path) -> list[Sample]:
    import datasets

    rows = datasets.load_from_disk(str(path), keep_in_memory=True)
    return [_sample(row) for row in rows]


def _sample(row: Mapping[str, Any]) -> Sample:
    # Only folders with such samples have these columns.
    mask, asked = row.get("supervised"), row.get("question_tokens", 0)
    values = {name: row[name] for name in COLUMNS} | {"ids": np.asarray(row["ids"], dtype=np.int64)}
    marks = None if mask is None else np.asarray(mask, dtype=bool)
    return Sample(**values, supervised=marks, question_tokens=int(asked))


def _readable(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
