"""Telling plan files apart by what they hold, and reading and writing those of other tools."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from moa_search.errors import ConfigError
from moa_search.formats.duo import DUO_FILES, looks_like_scores, read_duo, read_duo_sizes, write_duo
from moa_search.formats.engines import ENGINES, Engine
from moa_search.formats.engines.windows import LayerWindows
from moa_search.formats.files import atomic_write, parse_plan_json, read_file, sha256_of
from moa_search.formats.hub import SCHEME
from moa_search.formats.imported import imported
from moa_search.formats.layer_bits import LAYER_BITS, LayerBits, layer_tiers, stored_in, whole_plan
from moa_search.formats.moa import MOA_KEYS, read_moa, write_moa
from moa_search.formats.plan import Plan
from moa_search.formats.restricting import as_engine_runs, as_layers_store
from moa_search.formats.signature import ModelSignature
from moa_search.formats.tiers import Tier
from moa_search.formats.transforms import KeyTransforms
from moa_search.spans import MAX_LENGTH

PlanFormat = Literal["plan", "moa", "duo", "tensorrt-llm", "mlx", "executorch", "onnx", "modelopt", "kvtuner"]
"""Ours, MoA's JSON, DuoAttention's folder, engines' windows per layer, and precisions per layer."""

JSON_FORMATS = ("mlx", "onnx", "modelopt")

YAML_BYTES = 2**20
"""Longer files aren't tried as YAML, which takes long to read."""

LAYER_FORMATS: dict[str, Engine | LayerBits] = {**ENGINES, **LAYER_BITS}


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
    raw = read_file(path)
    content = _loosely(raw)
    if isinstance(content, dict):
        return _format_of(content)
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
    bits: Tier | None = None,
    transforms: KeyTransforms | None = None,
) -> Plan:
    """A plan from another tool's file or, of DuoAttention, folder.

    Args:
        path: The file or folder.
        model: The model that it was made for.
        fold_lengths: MoA: as for `read_moa`.
        threshold: DuoAttention: as for `read_duo`.
        sparsity: DuoAttention: as for `read_duo`.
        sink: DuoAttention: first tokens kept, instead of what the ``config.json`` beside the table says.
        recent: DuoAttention: newest tokens kept, likewise.
        bits: Of all keys and of all values, for formats that say none.
        transforms: Of keys, which keys below 8 bits need.

    Raises:
        PlanFormatError: The content is damaged.
        ModelMismatchError: It is of another model.
        ConfigError: A file is missing, an option is out of range or belongs to another format, or keys in few bits come
            without transforms.
    """
    kind = find_format(path)
    duo = {"threshold": threshold, "sparsity": sparsity, "sink": sink, "recent": recent}
    for name, value in duo.items():
        if kind != "duo" and value is not None:
            raise ConfigError(f"{name}: it is for DuoAttention's scores, and {path} is {_described(kind)}")
    if kind != "moa" and fold_lengths:
        raise ConfigError(
            f"fold_lengths: it is for MoA's plans, and {path} is {_described(kind)}, so nothing is folded"
        )
    if kind in LAYER_BITS and bits is not None:
        raise ConfigError(f"bits: {path} is {_described(kind)} and says its own")
    if kind == "duo":
        plan = _read_duo(Path(path), model, **duo)  # type: ignore[arg-type]
    elif kind == "moa":
        plan = read_moa(read_file(path), model, source=str(path), fold_lengths=fold_lengths)
    else:
        plan = _read_layers(kind, read_file(path), model, str(path), transforms)
    return plan if bits is None else stored_in(plan, bits, transforms)


def restricted(plan: Plan, format: PlanFormat, length: int | None = None) -> Plan:
    """What a format keeps of a plan, as a plan that runs here; the plan itself for formats that keep all or refuse.

    Args:
        plan: The plan.
        format: The format.
        length: Engines: context in tokens whose spans become windows; by default the longest of `Plan.lengths`.

    Raises:
        ConfigError: ``length`` is given for a format that has no use for it.
    """
    if format in ENGINES:
        return as_engine_runs(plan, ENGINES[format], max(plan.lengths) if length is None else length)
    if length is not None:
        raise ConfigError(f"window_length: it is for formats of engines ({', '.join(ENGINES)}), not {format}")
    return as_layers_store(plan, LAYER_BITS[format]) if format in LAYER_BITS else plan


def save_as(
    plan: Plan,
    path: str | os.PathLike[str],
    format: PlanFormat,
    *,
    reanchor: bool = False,
    window_length: int | None = None,
) -> Plan:
    """Write a plan in one of the formats; nothing is written where it can't be expressed.

    Args:
        plan: The plan.
        path: File, for DuoAttention a folder.
        format: The format.
        reanchor: MoA: as for `write_moa`.
        window_length: Engines: as for `restricted`.

    Returns:
        What the file says, as a plan; its notes say what was lost.

    Raises:
        ConfigError: The format can't say what the plan says, or the file can't be written.
    """
    kept = restricted(plan, format, window_length)
    if format == "plan":
        plan.save(path)
        return plan
    if format == "moa":
        texts = {Path(path): write_moa(plan, reanchor=reanchor)}
    elif format == "duo":
        texts = {Path(path) / name: text for name, text in write_duo(plan).items()}
    else:
        texts = {Path(path): _layers_text(kept, format)}
    for file, text in texts.items():
        with atomic_write(file) as out:
            out.write(text.encode())
    return kept


def _layers_text(kept: Plan, format: PlanFormat) -> str:
    """The text of an engine's file, or of one with precisions, for a plan that is within the format."""
    engine = ENGINES.get(format)
    if engine is not None:
        content = engine.write(LayerWindows.of(kept, MAX_LENGTH, sinks=engine.keeps_sink), kept.model)
    else:
        kind = LAYER_BITS[format]
        content = kind.write(layer_tiers(kept, kind.tiers))
    notes = kept.provenance.notes if kept.provenance else ()
    if format not in JSON_FORMATS:
        lines = "".join(f"# {note}\n" for note in notes)
        body: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
        return lines + body
    return json.dumps({"notes": list(notes), **content} if format in ENGINES else content, indent=2) + "\n"


def _read_layers(
    kind: PlanFormat, raw: bytes, model: ModelSignature, source: str, transforms: KeyTransforms | None
) -> Plan:
    content = parse_plan_json(raw, source) if kind in JSON_FORMATS else _loosely(raw)
    found = LAYER_FORMATS[kind]
    if isinstance(found, Engine):
        plan = found.read(content, model, source).plan(model, source)
    else:
        plan = whole_plan(found.read(content, model, source), model, transforms=transforms)
    return imported(plan, found.title, [f"{found.title}'s file, {sha256_of(raw)}"], model.usual_lengths)


def _read_duo(
    path: Path,
    model: ModelSignature,
    *,
    sink: int | None,
    recent: int | None,
    threshold: float | None,
    sparsity: float | None,
) -> Plan:
    table = path / DUO_FILES[0] if path.is_dir() else path
    if sink is None or recent is None:
        beside = table.with_name(DUO_FILES[1])
        if not beside.is_file():
            raise ConfigError(
                f"{path}: no {DUO_FILES[1]} beside it says how much short heads keep; give sink and recent"
            )
        own_sink, own_recent = read_duo_sizes(read_file(beside), source=str(beside))
        sink, recent = own_sink if sink is None else sink, own_recent if recent is None else recent
    return read_duo(
        read_file(table), model, sink=sink, recent=recent, threshold=threshold, sparsity=sparsity, source=str(table)
    )


def _format_of(content: Mapping[Any, Any]) -> PlanFormat:
    if "schema" in content:
        return "plan"
    if any(key in content for key in MOA_KEYS):
        return "moa"
    name = next((name for name, kind in LAYER_FORMATS.items() if kind.claims(dict(content))), "plan")
    return cast(PlanFormat, name)


def _loosely(raw: bytes) -> Any:
    """The value of a JSON or YAML text, None where it is neither."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        pass
    if len(raw) > YAML_BYTES or looks_like_scores(raw):
        return None
    try:
        return yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        return None


def _described(kind: PlanFormat) -> str:
    names = {"plan": "a plan of ours", "moa": "a plan of MoA's", "duo": "DuoAttention's"}
    names |= {name: f"{kind.title}'s" for name, kind in LAYER_FORMATS.items()}
    return names[kind]
