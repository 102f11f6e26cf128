"""Caches as safetensors files: a document that is read once and answered from later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moa_search.errors import CacheFormatError, CacheVersionError, ConfigError, ModelMismatchError
from moa_search.formats.files import atomic_path, describe_invalid, one_line, parse_json
from moa_search.modeling.loading import weights_hash
from moa_search.modeling.text import attention_modules
from moa_search.modeling.wrappers import decoder_within
from moa_search.runtime.batching import growing_layers
from moa_search.runtime.coded import growing_layer
from moa_search.runtime.rules import rules_of
from moa_search.runtime.state import LayerState
from moa_search.version import __version__

if TYPE_CHECKING:
    import os

    from moa_search.formats import Plan
    from moa_search.runtime.cache import MoACache
    from moa_search.runtime.layer import MoACacheLayer
    from moa_search.runtime.rules import LayerRules

SCHEMA: Final = "moa-cache/1"
METADATA_KEY = "moa_cache"


class _Layer(BaseModel):
    """The counts of a `LayerState`, and the model's own window, which the plan doesn't say."""

    model_config = ConfigDict(extra="forbid", strict=True)

    sliding_window: int | None = Field(ge=1)
    reserved: int = Field(ge=0, lt=2**31)
    slack: int = Field(ge=0, lt=2**31)
    rollback: int | None = Field(ge=0)
    seen: int = Field(ge=0)
    unpadded: int = Field(ge=0)


class _Header(BaseModel):
    """What the file says beside its tensors, ``layer.<index>.<name>``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    library_version: str
    plan: str = Field(pattern="^sha256:[0-9a-f]{64}$", description="fingerprint of the plan")
    weights: str | None = Field(pattern="^sha256:[0-9a-f]{64}$", description="hash of the model's weights")
    layers: list[_Layer]


def save(cache: MoACache, path: str | os.PathLike[str], model: Any) -> None:
    """As `MoACache.save`."""
    counts, tensors = [], {}
    for index, layer in enumerate(growing_layers(cache, "saved")):
        state = layer.state()
        for name, tensor in state.tensors.items():
            tensors[f"layer.{index}.{name}"] = tensor.detach().cpu().contiguous()
        of_state = {name: getattr(state, name) for name in _Layer.model_fields if name != "sliding_window"}
        counts.append(_Layer(sliding_window=layer.rules.sliding_window, **of_state))
    header = _Header(
        library_version=__version__,
        plan=cache.fingerprint,
        weights=None if model is None else weights_hash(decoder_within(model)),
        layers=counts,
    )
    # One entry, since safetensors writes several in any order.
    content = json.dumps({"schema": SCHEMA, **header.model_dump()})
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: content})
        except SafetensorError as error:  # a disk that is full, for one
            raise ConfigError(f"{path}: can't be written ({one_line(error)})") from None


def load(path: str | os.PathLike[str], plan: Plan, model: Any, device: str | torch.device) -> MoACache:
    """As `MoACache.load`."""
    from moa_search.runtime.cache import MoACache

    if not Path(path).is_file():
        raise ConfigError(f"{path}: {'not a file' if Path(path).exists() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            header = _read_header(path, (file.metadata() or {}).get(METADATA_KEY))
            _require_same(path, header, plan, model)
            rules = rules_of(plan, [layer.sliding_window for layer in header.layers])
            places = _places(len(rules), model, device)
            layers = [
                _read_layer(path, file, index, counts, of_layer, place)
                for index, (counts, of_layer, place) in enumerate(zip(header.layers, rules, places, strict=True))
            ]
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or one_line(error)}") from None
    except SafetensorError as error:
        raise CacheFormatError(f"{path}: not a safetensors file, or a truncated one ({one_line(error)})") from None
    return MoACache.of_layers(layers, header.plan)


def _read_header(path: str | os.PathLike[str], text: str | None) -> _Header:
    if text is None:
        raise CacheFormatError(f'{path}: not a cache of moa-search (no "{METADATA_KEY}" among its metadata)')
    try:
        content = parse_json(text)
        schema = content.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CacheFormatError(f"{path}: damaged: its metadata isn't what moa-search wrote") from None
    if schema != SCHEMA:
        raise CacheVersionError(f"{path}: schema {one_line(schema)} is unknown to moa-search {__version__}; upgrade it")
    try:
        return _Header.model_validate(content)
    except ValidationError as error:
        raise CacheFormatError(f"{path}: damaged: {describe_invalid(error)}") from None


def _read_layer(
    path: str | os.PathLike[str], file: Any, index: int, counts: _Layer, rules: LayerRules, place: torch.device
) -> MoACacheLayer:
    prefix = f"layer.{index}."
    tensors = {
        name.removeprefix(prefix): file.get_tensor(name).to(place)
        for name in file.keys()  # noqa: SIM118 - not a mapping
        if name.startswith(prefix)
    }
    layer = growing_layer(rules)
    try:
        layer.restore(LayerState(tensors, **counts.model_dump(exclude={"sliding_window"})))
    except KeyError as error:
        raise CacheFormatError(f"{path}: damaged: layer {index} has no tensor {error}") from None
    except ValueError as error:
        raise CacheFormatError(f"{path}: damaged: layer {index}: {one_line(error)}") from None
    return layer


def _require_same(path: str | os.PathLike[str], header: _Header, plan: Plan, model: Any) -> None:
    """Refuse another plan, another number of layers, and other weights."""
    if header.plan != plan.fingerprint:
        raise ModelMismatchError(
            f"{path}: filled under another plan ({_short(header.plan)}) than this one ({_short(plan.fingerprint)})"
        )
    if len(header.layers) != plan.model.num_hidden_layers:
        raise CacheFormatError(
            f"{path}: damaged: {len(header.layers)} layers, and the plan's model has {plan.model.num_hidden_layers}"
        )
    if model is None:
        return
    if header.weights is None:
        raise ConfigError(f"{path}: it doesn't say whose weights filled it; load it without model, or save(model=...)")
    if header.weights != weights_hash(decoder_within(model)):
        raise ModelMismatchError(f"{path}: filled by other weights than the model's; fill it again")


def _places(layers: int, model: Any, device: str | torch.device) -> list[torch.device]:
    """Where each layer goes."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError):  # unknown, or of a build without it
        raise ConfigError(f"device {str(device)!r} isn't there") from None
    if model is None:
        return [place] * layers
    found = [place] * layers
    for module in attention_modules(decoder_within(model)):
        weights = next(module.parameters(), None)
        if weights is not None and not weights.is_meta:
            found[module.layer_idx] = weights.device
    return found


def _short(fingerprint: str) -> str:
    return fingerprint[: len("sha256:") + 8]
