"""Plans from and for other tools."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.api.common import require_writable, require_writable_folder
from moa_search.errors import ConfigError
from moa_search.options import ImportOptions, PlanFormat, takes

if TYPE_CHECKING:
    from moa_search.formats import ModelSignature, Plan, PlanLike

SIZES = ("layers", "heads", "kv_heads", "head_dim")
"""What a model given by its numbers alone is made of."""


@takes(ImportOptions)
def import_plan(plan: str | PlanLike, options: ImportOptions) -> Plan:
    """Read a plan of ours, of MoA's or of DuoAttention's; the content says which it is.

    MoA's plans come out with ``anchor: prompt``; ``plan.anchored_at(length)`` makes them runnable. The notes in
    ``plan.provenance`` say what the import rounded, joined and cost.

    Args:
        plan: File with a plan of ours or MoA's alphas and betas, or DuoAttention's folder or table of scores.
        options: As keywords, each described in `ImportOptions`.

    Returns:
        The plan.

    Raises:
        PlanFormatError: The file is damaged.
        ModelMismatchError: It is of another model.
        ModelNotFoundError: ``model`` names nothing that can be loaded.
        ConfigError: An option is missing, out of range or for another format.
    """
    from moa_search.formats import Plan
    from moa_search.formats.foreign import find_format, read_foreign

    foreign = {
        "fold_lengths": list(options.fold_lengths) or None,
        "threshold": options.threshold,
        "sparsity": options.sparsity,
        "sink": options.sink,
        "recent": options.recent,
    }
    given = {name: value for name, value in foreign.items() if value is not None}
    if not isinstance(plan, str | os.PathLike) or find_format(plan) == "plan":
        if given:
            raise ConfigError(f"{next(iter(given))}: it is for plans of other tools")
        loaded = Plan.of(plan)
        if options.model is not None:
            loaded.model.require(_signature(options.model, options.trust_remote_code), "the plan")
        return loaded
    if options.model is None:
        raise ConfigError(
            f"{plan}: a plan of another tool doesn't say which model it is for; give model: a hub id, a folder, a plan "
            "or profile of it"
        )
    return read_foreign(plan, _signature(options.model, options.trust_remote_code), **given)  # type: ignore[arg-type]


def export_plan(plan: str | PlanLike, output: str, *, format: PlanFormat = "moa", reanchor: bool = False) -> Plan:
    """Write a plan in another tool's format, or say why that can't express it.

    Args:
        plan: Plan file, Plan or what is in its file.
        output: File to write; for DuoAttention a folder.
        format: ``moa`` for MoA's alphas and betas, ``duo`` for DuoAttention's folder, ``plan`` for ours.
        reanchor: ``moa``: write rules that are evaluated at every position, too; MoA evaluates them once, at the total
            length, so that earlier tokens attend more.

    Returns:
        The plan.

    Raises:
        ConfigError: The format can't express the plan, or the file can't be written.
    """
    from moa_search.formats import Plan
    from moa_search.formats.foreign import save_as

    loaded = Plan.of(plan)
    if format == "duo":
        require_writable_folder(output)
    else:
        require_writable(output)
    save_as(loaded, output, format, reanchor=reanchor)
    return loaded


def _signature(model: Any, trust_remote_code: bool) -> ModelSignature:
    """The signature of whatever stands for a model."""
    from moa_search.formats import ModelSignature, Plan, Profile

    if isinstance(model, ModelSignature):
        return model
    if isinstance(model, Plan | Mapping):
        return Plan.of(model, "model").model
    if not isinstance(model, str | os.PathLike):
        return ModelSignature.of(getattr(model, "config", model))
    spec = os.fspath(model)
    if Path(spec).is_file() and spec.endswith(".safetensors"):
        return Profile.load(spec).header.model
    if Path(spec).is_file() and not spec.endswith(".gguf"):
        return Plan.load(spec).model
    if "=" in spec:
        return _from_numbers(spec)
    from moa_search.modeling.loading import load_config

    return ModelSignature.of(load_config(spec, trust_remote_code=trust_remote_code))


def _from_numbers(spec: str) -> ModelSignature:
    """A signature from ``layers=32,heads=32,kv_heads=8,head_dim=128``; it fits no model but tells heads apart."""
    from moa_search.formats import ModelSignature

    entries = [entry.partition("=") for entry in spec.split(",")]
    numbers = {name.strip(): value.strip() for name, _, value in entries}
    if sorted(numbers) != sorted(SIZES) or len(entries) != len(SIZES):
        raise ConfigError(f"model: {spec!r} has to give {', '.join(SIZES)}, as in layers=32,heads=32,...")
    if not all(value.isdecimal() and int(value) for value in numbers.values()):
        raise ConfigError(f"model: {spec!r} holds something other than whole numbers over 0")
    layers, heads, kv_heads, head_dim = (int(numbers[name]) for name in SIZES)
    if heads % kv_heads:
        raise ConfigError(f"model: {heads} query heads can't share {kv_heads} KV heads evenly")
    return ModelSignature(
        architecture="unknown",
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
