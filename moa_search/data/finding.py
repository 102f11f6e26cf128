"""Which rows or texts a source names: files of one's own, data sets on disk, published ones."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa_search.data.rows import COMPRESSED, READERS, TEXT_FILES, Rows, arrow_rows, ending, read_csv, read_text
from moa_search.data.sources import SourceSpec
from moa_search.data.texts import squeezed
from moa_search.errors import ConfigError
from moa_search.formats.files import one_line
from moa_search.modeling.source import cache_dir

KINDS = (*READERS, *TEXT_FILES)

SPLIT_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
"""Words in the name of a folder or file that say which split it is, as `datasets` reads them."""

ABOUT = ("readme.md", "license.md", "license.txt", "dataset_infos.json")
"""Files of a folder that hold no data."""

Part = tuple[Rows, int, int]
"""Rows, and which of them: from, to."""


@dataclass(frozen=True)
class Found:
    """What a source names: texts, or else rows.

    Attributes:
        texts: Whole text files.
        parts: Stretches of rows.
    """

    texts: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


def find(spec: SourceSpec) -> Found:
    """What a source names, as it is on disk now.

    Raises:
        ConfigError: It can't be read, or holds nothing.
    """
    where = f"source {spec.typed!r}"
    path = Path(spec.data).expanduser()
    is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if is_saved:
            found = Found(parts=_saved(path, spec))
        elif path.is_dir() and not _is_repository(path, spec):
            found = _of_files(_by_split(_files_in(path), path), spec)
        elif path.is_file():  # before it is taken for a pattern: its name may hold brackets
            found = _of_files({"train": [path]}, spec)
        else:
            pattern = re.sub(r"([?[])", r"[\1]", str(path))  # only * stands for others
            files = [] if path.is_dir() else [Path(name) for name in sorted(glob.glob(pattern)) if Path(name).is_file()]
            if not files and not path.is_dir() and _looks_local(spec.data):
                raise ConfigError(f"{spec.data} doesn't exist")
            found = _of_files({"train": files}, spec) if files else Found(parts=_published(path, spec))
    except ConfigError as error:
        raise ConfigError(f"{where} can't be read: {error}") from error
    except Exception as error:  # datasets lets through whatever its readers raise
        reason = squeezed(str(error)) or type(error).__name__
        raise ConfigError(f"{where} can't be read: {one_line(reason)}{spec.hint}") from error
    if not found.texts and not any(stop > start for _, start, stop in found.parts):
        raise ConfigError(f"{where} has no rows")
    return found


def _of_files(splits: Mapping[str, Sequence[Path]], spec: SourceSpec) -> Found:
    """Texts or rows of local files, which are of one kind."""
    files = [file for some in splits.values() for file in some]
    endings = {ending(file) for file in files}
    unknown = sorted(endings - set(KINDS))
    if unknown:
        what, known = unknown[0] or "a file without ending", ", ".join(KINDS)
        raise ConfigError(f"{what} is not one of {known} (or one of those and {' or '.join(COMPRESSED)})")
    if endings <= set(TEXT_FILES):
        _cut({"train": []}, spec.split)
        return Found(texts=[read_text(file) for file in files])
    if len(endings) > 1:
        raise ConfigError(f"files of several kinds ({', '.join(sorted(endings))}); name those of one")
    read = READERS[endings.pop()]
    wanted = {spec.split: splits[spec.split]} if spec.split in splits else splits
    return Found(parts=_cut({name: [read(file) for file in some] for name, some in wanted.items()}, spec.split))


def _files_in(folder: Path) -> list[Path]:
    """A folder's files, without hidden ones; without those about the data, unless there is nothing but text."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    found.sort(key=lambda path: path.relative_to(folder).parts)
    if not found:
        raise ConfigError("the folder is empty")
    if all(ending(path) in TEXT_FILES for path in found):
        return found
    found = [path for path in found if path.name.lower() not in ABOUT]
    return [path for path in found if ending(path) in READERS] or found


def _by_split(files: Sequence[Path], folder: Path) -> dict[str, list[Path]]:
    """Files by the split that their folders, else their own names, say; all are for training where none says so."""
    if all(ending(file) in TEXT_FILES for file in files):
        return {"train": list(files)}
    for names in (slice(-1), slice(-1, None)):
        splits: dict[str, list[Path]] = {}
        for name, words in SPLIT_WORDS.items():
            word = re.compile(rf"(?:^|[-._ 0-9])(?:{words})(?:[-._ 0-9]|$)")
            mine = [file for file in files if any(map(word.search, file.relative_to(folder).parts[names]))]
            if mine:
                splits[name] = mine
        if splits:
            return splits
    return {"train": list(files)}


def _cut(splits: Mapping[str, Sequence[Rows]], asked: str) -> list[Part]:
    """The rows that a split names, such as ``train``, ``train[:100]`` or ``train+test``.

    Raises:
        ValueError: There is no such split.
    """
    if asked in splits:
        return [(rows, 0, len(rows.numbers)) for rows in splits[asked]]
    from datasets import ReadInstruction  # type: ignore[import-untyped]

    sizes = {name: sum(len(rows.numbers) for rows in parts) for name, parts in splits.items()}
    found: list[Part] = []
    for piece in ReadInstruction.from_spec(asked).to_absolute(sizes):
        start, stop = piece.from_, piece.to
        for rows in splits[piece.splitname]:
            count = len(rows.numbers)
            found.append((rows, min(max(start, 0), count), min(max(stop, 0), count)))
            start, stop = start - count, stop - count
    return found


def _looks_local(data: str) -> bool:
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or "*" in data or ending(Path(data)) in KINDS


def _is_repository(folder: Path, spec: SourceSpec) -> bool:
    """Whether a folder says by itself which of its files are what, as a published data set's copy does."""
    from huggingface_hub import metadata_load
    from huggingface_hub.constants import REPOCARD_NAME

    card = folder / REPOCARD_NAME
    return spec.subset is not None or (card.is_file() and "configs" in (metadata_load(card) or {}))


def _saved(folder: Path, spec: SourceSpec) -> list[Part]:
    """A data set that ``save_to_disk`` wrote."""
    import datasets

    with _quiet(datasets):
        rows = datasets.load_from_disk(str(folder), keep_in_memory=True)
    if isinstance(rows, datasets.DatasetDict):
        return _cut({name: [_arrow(part, spec)] for name, part in rows.items()}, spec.split)
    name = spec.split if spec.split == "train" else str(rows.split or "train")
    return _cut({name: [_arrow(rows, spec)]}, spec.split)


def _published(path: Path, spec: SourceSpec) -> list[Part]:
    """A data set of the hub, or a copy of its repository.

    `datasets` finds and downloads its files; those of rows are read here, so that no type is inferred.
    """
    import datasets

    name = str(path.resolve()) if path.is_dir() else spec.data
    if path.is_dir() and any(sign in str(path.resolve()) for sign in "*?[]"):
        raise ConfigError("the folder's name would be taken for a pattern; rename it, or give its files")
    if name.isidentifier() and importlib.util.find_spec(f"datasets.packaged_modules.{name}"):
        # It would read the files of the current folder that look like the kind.
        raise ConfigError(f"{name} is a kind of file, not a data set; name the file")
    cache = str(cache_dir() / "datasets")
    with _quiet(datasets):
        builder = datasets.load_dataset_builder(name, spec.subset, cache_dir=cache)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind == "pandas":
            raise ConfigError("its files are pickles, which can run code; give them as parquet or jsonl")
        if kind not in ("csv", "json", "parquet"):
            try:
                mode = datasets.DownloadMode.REUSE_CACHE_IF_EXISTS  # downloads, but not what was made of them before
                rows = datasets.load_dataset(name, spec.subset, split=spec.split, cache_dir=cache, download_mode=mode)
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ or error from None
            return [(_arrow(rows, spec), 0, len(rows))]
        options = builder.config
        own = [key for key in ("names", "column_names", "skiprows", "field") if getattr(options, key, None)]
        if own:
            raise ConfigError(f"its {kind} files are read with options of their own ({', '.join(own)}); give a file")
        loader = datasets.DownloadManager(name, download_config=datasets.DownloadConfig(cache_dir=f"{cache}/downloads"))
        local = {split: loader.download_and_extract(list(files)) for split, files in options.data_files.items()}
    read = {"csv": lambda file: read_csv(file, options.delimiter or options.sep)}.get(kind) or READERS[f".{kind}"]
    return _cut({split: [read(Path(file)) for file in files] for split, files in local.items()}, spec.split)


def _arrow(rows: Any, spec: SourceSpec) -> Rows:
    """Rows of a `datasets.Dataset`, read column by column."""
    table = rows.with_format("arrow")
    return arrow_rows(spec.data, rows.column_names, len(rows), lambda name: table.select_columns([name])[:][name])


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
