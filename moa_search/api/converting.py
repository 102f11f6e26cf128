"""Plans from and for other tools."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.api.common import load_profile, require_writable, require_writable_folder
from moa_search.errors import ConfigError
from moa_search.options import ImportOptions, PlanFormat, takes

if TYPE_CHECKING:
    from moa_search.formats import ModelSignature, Plan, PlanLike, Profile
    from moa_search.formats.tiers import Tier
    from moa_search.formats.transforms import KeyTransforms

SIZES = ("layers", "heads", "kv_heads", "head_dim")
"""What a model given by its numbers alone is made of."""


@takes(ImportOptions)
def import_plan(plan: str | PlanLike, options: ImportOptions) -> Plan:
    """Read a plan of ours or another tool's; the content says which it is.

    MoA's plans come out with ``anchor: prompt``; ``plan.anchored_at(length)`` makes them runnable. The notes in
    ``plan.provenance`` say what the import rounded, joined and cost.

    Args:
        plan: File with a plan of ours, MoA's alphas and betas, an engine's windows per layer, or ModelOpt's or
            KVTuner's bits per layer; or DuoAttention's folder or table of scores.
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

    foreign: dict[str, Any] = {
        "fold_lengths": list(options.fold_lengths) or None,
        "threshold": options.threshold,
        "sparsity": options.sparsity,
        "sink": options.sink,
        "recent": options.recent,
        "bits": _tier(options.bits) if options.bits else None,
    }
    given = {name: value for name, value in foreign.items() if value is not None}
    if not isinstance(plan, str | os.PathLike) or find_format(plan) == "plan":
        if given:
            raise ConfigError(f"{next(iter(given))}: it is for plans of other tools")
        loaded = Plan.of(plan)
        if options.model is not None:
            loaded.model.require(_about(options.model, options.trust_remote_code)[0], "the plan")
        return loaded
    if options.model is None:
        raise ConfigError(
            f"{plan}: a plan of another tool doesn't say which model it is for; give model: a hub id, a folder, a plan "
            "or profile of it"
        )
    signature, transforms = _about(options.model, options.trust_remote_code)
    return read_foreign(plan, signature, transforms=transforms, **given)


def export_plan(
    plan: str | PlanLike,
    output: str,
    *,
    format: PlanFormat = "moa",
    reanchor: bool = False,
    window_length: int | None = None,
    profile: str | Profile | None = None,
) -> Plan:
    """Write a plan in another tool's format, or say why that can't express it.

    Formats of engines and of precisions hold less than a plan. What is written is then the nearest that loses no
    quality but what the engine can't do at all, and is returned as a plan that runs here: its loss is what the engine's
    will be, as far as the restriction goes.

    Args:
        plan: Plan file, Plan or what is in its file.
        output: File to write; for DuoAttention a folder.
        format: ``moa`` for MoA's alphas and betas, ``duo`` for DuoAttention's folder, ``plan`` for ours;
            ``tensorrt-llm``, ``mlx``, ``executorch`` and ``onnx`` for one window per layer, ``modelopt`` and
            ``kvtuner`` for one precision per layer.
        reanchor: ``moa``: write rules that are evaluated at every position, too; MoA evaluates them once, at the total
            length, so that earlier tokens attend more.
        window_length: Engines: context in tokens whose spans become the windows; by default the longest that the plan
            was made for.
        profile: ``modelopt``, ``kvtuner``: predicts what the change costs, in the notes.

    Returns:
        The plan as the file has it; its notes say what was lost.

    Raises:
        ConfigError: The format can't express the plan, or the file can't be written.
    """
    from moa_search.formats import Plan
    from moa_search.formats.foreign import save_as
    from moa_search.formats.layer_bits import LAYER_BITS

    if profile is not None and format not in LAYER_BITS:
        raise ConfigError(f"profile: it predicts what {' or '.join(LAYER_BITS)} change, not {format}")

    loaded = Plan.of(plan)
    if format == "duo":
        require_writable_folder(output)
    else:
        require_writable(output)
    kept = save_as(loaded, output, format, reanchor=reanchor, window_length=window_length)
    return kept if profile is None else _priced(loaded, kept, load_profile(profile))


def _priced(plan: Plan, kept: Plan, profile: Profile) -> Plan:
    """``kept`` with a note of the losses that a profile predicts before and after."""
    from moa_search.formats.tiers import PLAIN_BITS
    from moa_search.search.comparing import predicted_losses

    profile.header.model.require(plan.model, "the profile")
    criterion = plan.provenance.criterion if plan.provenance and plan.provenance.criterion else "signed"
    measured = {PLAIN_BITS, *(profile.header.tiers.bits if profile.header.tiers else ())}
    lacking = {bits for one in (plan, kept) for heads in one.tiers for tier in heads for bits in tier} - measured
    if lacking:
        shown = ", ".join(map(str, sorted(lacking, reverse=True)))
        note = f"no predicted loss: the profile knows nothing of {shown} bits (moa-profile --tiers)"
    else:
        before, after = (predicted_losses(profile, one, criterion) for one in (plan, kept))
        changes = ", ".join(f"{before[n][0]:.4g} -> {after[n][0]:.4g} at {n}" for n in profile.lengths)
        note = f"predicted loss, {criterion}, of other tokens than the first ones: {changes}"
    origin = kept.provenance
    assert origin is not None
    return kept.model_copy(update={"provenance": origin.model_copy(update={"notes": (*origin.notes, note)})})


def _tier(bits: Sequence[int]) -> Tier:
    """Bits of keys and of values."""
    from moa_search.formats.tiers import CODED_BITS, PLAIN_BITS

    tier = tuple(bits) * 2 if len(bits) == 1 else tuple(bits)
    if len(tier) != 2 or set(bits) - {PLAIN_BITS, *CODED_BITS}:
        shown = " ".join(map(str, bits))
        raise ConfigError(f"bits: {shown} can't be stored; give bits of keys and of values out of 16, 8, 4, 3 and 2")
    return tier[0], tier[1]


def _about(model: Any, trust_remote_code: bool) -> tuple[ModelSignature, KeyTransforms | None]:
    """The signature of whatever stands for a model, and transforms of its keys where that knows them."""
    from moa_search.formats import ModelSignature, Plan, Profile

    if isinstance(model, ModelSignature):
        return model, None
    if isinstance(model, Plan | Mapping):
        return _of_plan(Plan.of(model, "model"))
    if isinstance(model, Profile):
        return model.header.model, None if model.tiers is None else model.tiers.transforms
    if not isinstance(model, str | os.PathLike):
        return ModelSignature.of(getattr(model, "config", model)), None
    spec = os.fspath(model)
    if Path(spec).is_file() and spec.endswith(".safetensors"):
        return _about(Profile.load(spec), trust_remote_code)
    if Path(spec).is_file() and not spec.endswith(".gguf"):
        return _of_plan(Plan.load(spec))
    if "=" in spec:
        return _from_numbers(spec), None
    from moa_search.modeling.loading import load_config

    return ModelSignature.of(load_config(spec, trust_remote_code=trust_remote_code)), None


def _of_plan(plan: Plan) -> tuple[ModelSignature, KeyTransforms | None]:
    return plan.model, plan.key_transforms


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
