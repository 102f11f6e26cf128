"""Telling plan files apart by what they hold, and reading and writing those of other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from moa_search.errors import ConfigError
from moa_search.formats.duo import DUO_FILES, looks_like_scores, read_duo, read_duo_sizes, write_duo
from moa_search.formats.files import atomic_write
from moa_search.formats.hub import SCHEME
from moa_search.formats.moa import MOA_KEYS, read_moa, write_moa
from moa_search.formats.plan import Plan
from moa_search.formats.signature import ModelSignature

PlanFormat = Literal["plan", "moa", "duo"]
"""Ours, MoA's JSON and DuoAttention's folder."""


def find_format(path: str | os.PathLike[str]) -> PlanFormat:
    """What a file or folder seems to be; ``plan`` where it seems to be nothing, since that reader says why.

    Raises:
        ConfigError: There is no such file, or the folder holds no table of scores.
    """
    if os.fspath(path).startswith(SCHEME):
        return "plan"
    if Path(path).is_dir():
        if not (Path(path) / DUO_FILES[0]).is_file():
            raise ConfigError(f"{path}: a folder with neither {DUO_FILES[0]} nor a front; give a plan's file")
        return "duo"
    raw = _read(path)
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        return "duo" if looks_like_scores(raw) else "plan"
    if isinstance(content, dict):
        return "moa" if "schema" not in content and any(key in content for key in MOA_KEYS) else "plan"
    return "duo" if looks_like_scores(raw) else "plan"


def read_foreign(
    path: str | os.PathLike[str],
    model: ModelSignature,
    *,
    fold_lengths: Sequence[int] = (),
    threshold: float | None = None,
    sparsity: float | None = None,
    sink: int | None = None,
    recent: int | None = None,
) -> Plan:
    """A plan from a file of MoA's or a folder, or its table, of DuoAttention's.

    Args:
        path: The file or folder.
        model: The model that it was made for.
        fold_lengths: MoA: as for `read_moa`.
        threshold: DuoAttention: as for `read_duo`.
        sparsity: DuoAttention: as for `read_duo`.
        sink: DuoAttention: first tokens kept, instead of what the ``config.json`` beside the table says.
        recent: DuoAttention: newest tokens kept, likewise.

    Raises:
        PlanFormatError: The content is damaged.
        ModelMismatchError: It is of another model.
        ConfigError: A file is missing, or an option is out of range or belongs to the other format.
    """
    if find_format(path) == "moa":
        for name, value in (("threshold", threshold), ("sparsity", sparsity), ("sink", sink), ("recent", recent)):
            if value is not None:
                raise ConfigError(f"{name}: it is for DuoAttention's scores, and {path} is a plan of MoA's")
        return read_moa(_read(path), model, source=str(path), fold_lengths=fold_lengths)
    if fold_lengths:
        raise ConfigError(f"fold_lengths: DuoAttention decides per KV head, so that nothing in {path} is folded")
    table = Path(path) / DUO_FILES[0] if Path(path).is_dir() else Path(path)
    if sink is None or recent is None:
        beside = table.with_name(DUO_FILES[1])
        if not beside.is_file():
            raise ConfigError(
                f"{path}: no {DUO_FILES[1]} beside it says how much short heads keep; give sink and recent"
            )
        own_sink, own_recent = read_duo_sizes(_read(beside), source=str(beside))
        sink, recent = own_sink if sink is None else sink, own_recent if recent is None else recent
    return read_duo(
        _read(table), model, sink=sink, recent=recent, threshold=threshold, sparsity=sparsity, source=str(table)
    )


def save_as(plan: Plan, path: str | os.PathLike[str], format: PlanFormat, *, reanchor: bool = False) -> None:
    """Write a plan in one of the formats; nothing is written where it can't be expressed.

    Args:
        plan: The plan.
        path: File, for DuoAttention a folder.
        format: The format.
        reanchor: MoA: as for `write_moa`.

    Raises:
        ConfigError: The format can't say what the plan says, or the file can't be written.
    """
    if format == "plan":
        plan.save(path)
        return
    texts = (
        {Path(path): write_moa(plan, reanchor=reanchor)}
        if format == "moa"
        else {Path(path) / name: text for name, text in write_duo(plan).items()}
    )
    for file, text in texts.items():
        with atomic_write(file) as out:
            out.write(text.encode())


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
