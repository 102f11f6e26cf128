"""Files that give a precision to each layer: ModelOpt's ``kv_cache_quantized_layers`` and KVTuner's YAML.

They say how many bits keys and values have, not by which codec: what runs here is ours, and its loss isn't theirs.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError
from moa_search.formats.files import nearest, one_line
from moa_search.formats.plan import Plan
from moa_search.formats.signature import ModelSignature
from moa_search.formats.tiers import CODED_BITS, PLAIN, PLAIN_BITS, Tier, token_bytes, wants_transform
from moa_search.formats.transforms import KeyTransforms
from moa_search.spans import DENSE
from moa_search.version import __version__

TiersByHead = list[list[Tier]]
"""Bits of keys and of values ``[layer][kv_head]``."""


class LayerBits(ABC):
    """A format.

    Attributes:
        name: Of the format.
        title: What people call the tool.
        tiers: Bits of keys and of values that it can say.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    tiers: ClassVar[Sequence[Tier]]

    @abstractmethod
    def claims(self, content: dict[Any, Any]) -> bool:
        """Whether a file's content is of this format."""

    @abstractmethod
    def write(self, tiers: Sequence[Tier]) -> dict[Any, Any]:
        """The file's content for bits by layer."""

    @abstractmethod
    def read(self, content: dict[Any, Any], model: ModelSignature, source: str) -> TiersByHead:
        """What a file says.

        Args:
            content: The file's.
            model: Its model.
            source: Names the file in errors.

        Raises:
            PlanFormatError: The content is no such file, or says bits that can't be stored here.
            ModelMismatchError: It is for another number of layers or heads.
        """


class ModelOpt(LayerBits):
    """``hf_quant_config.json``, or the quantisation part of ``config.json``, of version 1.

    Layers go by their modules' names and formats, absent ones aren't quantised (NVIDIA/Model-Optimizer#2272). Files of
    earlier versions have one format for all layers. The numbers' own formats, FP8 and NVFP4 with its scale per 16
    numbers, are taken for their bits.
    """

    name = "modelopt"
    title = "ModelOpt"
    tiers = (PLAIN, (8, 8), (8, 4), (4, 4))

    FORMATS: ClassVar[dict[str, Tier]] = {
        "FP8": (8, 8),
        "INT8": (8, 8),
        "FP8_K_NVFP4_V": (8, 4),
        "NVFP4": (4, 4),
        "NVFP4_AFFINE": (4, 4),
    }
    LAYERS, FORMAT, VERSION = "kv_cache_quantized_layers", "kv_cache_quant_algo", "kv_cache_schema_version"
    MIXED = "MIXED_PRECISION"

    def claims(self, content: dict[Any, Any]) -> bool:  # noqa: D102
        return self._section(content) is not None

    def write(self, tiers: Sequence[Tier]) -> dict[Any, Any]:  # noqa: D102
        names = {tier: name for name, tier in reversed(self.FORMATS.items())}
        layers = {
            f"model.layers.{layer}.self_attn": {"quant_algo": names[tier]}
            for layer, tier in enumerate(tiers)
            if tier != PLAIN
        }
        used = {entry["quant_algo"] for entry in layers.values()}
        section = {
            "quant_algo": None,
            self.FORMAT: self.MIXED if len(used) > 1 else next(iter(used), None),
            self.LAYERS: layers,
            self.VERSION: 1,
        }
        return {"producer": {"name": "moa-search", "version": __version__}, "quantization": section}

    def read(self, content: dict[Any, Any], model: ModelSignature, source: str) -> TiersByHead:  # noqa: D102
        section = self._section(content)
        assert section is not None
        if self.LAYERS not in section:
            return [[self._tier(section[self.FORMAT], f"{source}: {self.FORMAT}")] * model.num_key_value_heads] * (
                model.num_hidden_layers
            )
        if section.get(self.VERSION, 1) != 1:
            raise PlanFormatError(f"{source}: {self.VERSION} {one_line(section[self.VERSION])} is unknown; 1 is read")
        layers = section[self.LAYERS]
        if not isinstance(layers, dict):
            raise PlanFormatError(f"{source}: {self.LAYERS} is no object of layers")
        found: dict[int, Tier] = {}
        for name, entry in layers.items():
            match = re.search(r"(?:^|\.)layers\.(\d+)\.", f"{name}.")
            where = f"{source}: {self.LAYERS}: {one_line(name)}"
            if match is None:
                raise PlanFormatError(f"{where} names no layer, as model.layers.0.self_attn does")
            if int(match[1]) in found:
                raise PlanFormatError(f"{where} is layer {match[1]}, which another name has")
            found[int(match[1])] = self._tier(entry.get("quant_algo") if isinstance(entry, dict) else entry, where)
        _require_layers(found, model, source)
        return [[found.get(layer, PLAIN)] * model.num_key_value_heads for layer in range(model.num_hidden_layers)]

    def _section(self, content: dict[Any, Any]) -> dict[str, Any] | None:
        parts = [content, content.get("quantization"), content.get("quantization_config")]
        dicts = [part for part in parts if isinstance(part, dict)]
        return next((part for part in dicts if self.LAYERS in part or part.get(self.FORMAT)), None)

    def _tier(self, name: object, where: str) -> Tier:
        if not isinstance(name, str) or name not in self.FORMATS:
            hint = nearest(str(name), self.FORMATS)
            raise PlanFormatError(f"{where}: {one_line(name)} is no format of {', '.join(self.FORMATS)}{hint}")
        return self.FORMATS[name]


class KVTuner(LayerBits):
    """``{layer: {nbits_key, nbits_value}}`` of every layer, its ``per_layer_config_path``; read also by head.

    Bits are 2, 4 and 8 in its presets (cmd2001/KVTuner, arXiv 2502.04420); layers can't be left out, so that what the
    plan stores in 16 bits gets 16, which only its plain quantiser takes.
    """

    name = "kvtuner"
    title = "KVTuner"
    tiers = tuple((key, value) for key in (16, 8, 4, 2) for value in (16, 8, 4, 2))

    SIDES = ("nbits_key", "nbits_value")

    def claims(self, content: dict[Any, Any]) -> bool:  # noqa: D102
        if not content or not all(type(layer) is int for layer in content):
            return False
        first = next(iter(content.values()))
        heads = [first, *first.values()] if isinstance(first, dict) else []
        return any(isinstance(entry, dict) and self.SIDES[0] in entry for entry in heads)

    def write(self, tiers: Sequence[Tier]) -> dict[Any, Any]:  # noqa: D102
        return {layer: dict(zip(self.SIDES, tier, strict=True)) for layer, tier in enumerate(tiers)}

    def read(self, content: dict[Any, Any], model: ModelSignature, source: str) -> TiersByHead:  # noqa: D102
        _require_layers(content, model, source)
        heads = range(model.num_key_value_heads)
        found = []
        for layer in range(model.num_hidden_layers):
            where = f"{source}: layer {layer}"
            entry = content.get(layer)
            if not isinstance(entry, dict):
                raise PlanFormatError(f"{where} is missing or has no bits")
            if self.SIDES[0] in entry:
                found.append([self._tier(entry, where)] * len(heads))
                continue
            if set(entry) != set(heads):
                raise ModelMismatchError(
                    f"{where} has bits of heads {_some(entry)}; the model has {len(heads)} KV heads"
                )
            found.append([self._tier(entry[head], f"{where}, KV head {head}") for head in heads])
        return found

    def _tier(self, entry: object, where: str) -> Tier:
        bits = []
        for side in self.SIDES:
            value = entry.get(side) if isinstance(entry, dict) else None
            if type(value) is not int or value not in (PLAIN_BITS, *CODED_BITS):
                raise PlanFormatError(f"{where}: {side} is {one_line(value)}; 16, 8, 4, 3 and 2 bits can be stored")
            bits.append(value)
        return bits[0], bits[1]


LAYER_BITS: dict[str, LayerBits] = {kind.name: kind for kind in (ModelOpt(), KVTuner())}
"""By the name of their format."""


def layer_tiers(plan: Plan, available: Sequence[Tier]) -> list[Tier]:
    """For every layer the tier of fewest bytes that stores no KV head in fewer bits than the plan; 16 if native."""
    width = plan.model.head_dim
    cheapest = sorted(available, key=lambda tier: sum(token_bytes(bits, width) for bits in tier))
    found = []
    for heads in plan.tiers:
        least = [max(bits) for bits in zip(*heads, strict=True)]
        found.append(next(tier for tier in cheapest if tier[0] >= least[0] and tier[1] >= least[1]))
    return found


def whole_plan(
    tiers: Sequence[Sequence[Tier]],
    model: ModelSignature,
    *,
    native_layers: Collection[int] = (),
    transforms: KeyTransforms | None = None,
) -> Plan:
    """The plan in which every head attends everything, stored in ``tiers``, the first tokens too.

    Raises:
        ConfigError: Keys below 8 bits, and no transforms.
    """
    require_transforms_for(tiers, transforms)
    rules = [[DENSE] * model.num_key_value_heads] * model.num_hidden_layers
    return Plan.from_rules(
        rules, model, tiers=tiers, transforms=transforms, native_layers=native_layers, sink=0
    )  # fmt: skip


def stored_in(plan: Plan, tier: Tier, transforms: KeyTransforms | None) -> Plan:
    """The plan with every KV head stored in ``tier``.

    Raises:
        ConfigError: Keys below 8 bits, and no transforms.
    """
    tiers = [[tier] * plan.model.num_key_value_heads] * plan.model.num_hidden_layers
    require_transforms_for(tiers, transforms)
    fields = {name: getattr(plan, name) for name in ("sink", "block", "anchor", "provenance", "predicted")}
    return Plan.from_rules(
        plan.rules, plan.model, tiers=tiers, transforms=transforms, native_layers=plan.native_layers, **fields
    )


def require_transforms_for(tiers: Sequence[Sequence[Tier]], transforms: KeyTransforms | None) -> None:
    """Refuse keys in few bits without what they are stored under.

    Raises:
        ConfigError: There are such keys, and no transforms.
    """
    fewest = min((key for heads in tiers for key, _ in heads), default=PLAIN_BITS)
    if wants_transform(fewest) and transforms is None:
        raise ConfigError(
            f"model: keys in {fewest} bits need transforms that were measured on it; give a profile made with "
            "moa-profile --tiers, or a plan from one, as model"
        )


def _require_layers(layers: Mapping[int, object], model: ModelSignature, source: str) -> None:
    beyond = [layer for layer in layers if not 0 <= layer < model.num_hidden_layers]
    if beyond:
        raise ModelMismatchError(f"{source}: it has a layer {beyond[0]}, the model {model.num_hidden_layers} layers")


def _some(keys: Collection[object]) -> str:
    return one_line(", ".join(map(str, keys)) or "none")
