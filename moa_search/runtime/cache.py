"""The cache that a model under a plan generates with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from moa_search.errors import ConfigError, ModelUnsupportedError, UnsupportedInputError
from moa_search.formats import Plan
from moa_search.modeling.text import text_config
from moa_search.runtime import batching, saving
from moa_search.runtime.coded import StaticCodedCacheLayer, growing_layer
from moa_search.runtime.layer import ROLLBACK_TOKENS, MoACacheLayer
from moa_search.runtime.report import CacheReport, LayerReport
from moa_search.runtime.rules import layer_rules
from moa_search.runtime.static import StaticMoACacheLayer

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from moa_search.formats.plan import PlanLike
    from moa_search.runtime.rules import LayerRules


def _ragged(layer: Any, rules: LayerRules) -> Any:
    """What takes the place of a cache layer of transformers: itself where it holds no keys that grow."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return growing_layer(rules)
    if not isinstance(layer, DynamicLayer):
        return layer
    if not hasattr(layer, "update_conv_state"):
        raise ModelUnsupportedError(f"a plan can't take the place of the model's {type(layer).__name__}")
    from moa_search.runtime import hybrid  # only versions that have such layers can import it

    kind = hybrid.MoAHybridCacheLayer if rules.codecs is None else hybrid.CodedHybridCacheLayer
    return kind(rules, layer.number_of_states)


def _fixed(layer: Any, rules: LayerRules, max_length: int, before: list[Any]) -> StaticMoACacheLayer:
    """What takes its place in a cache of fixed size, after the layers ``before``."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ModelUnsupportedError(
            f"a MoACache of fixed size can't replace the model's {type(layer).__name__}; leave max_length, or "
            "cache_implementation, unset"
        )
    first = not any(isinstance(other, StaticMoACacheLayer) for other in before)
    kind = StaticMoACacheLayer if rules.codecs is None else StaticCodedCacheLayer
    return kind(rules, max_length, checks=first)


def _layers(rules: Sequence[LayerRules], config: Any, max_length: int | None) -> list[Any]:
    """A layer for each one that transformers would make."""
    layers: list[Any] = []
    for layer, of_layer in zip(DynamicCache(config=text_config(config)).layers, rules, strict=True):
        if max_length is None or not isinstance(layer, DynamicLayer):
            layers.append(_ragged(layer, of_layer))
        else:
            layers.append(_fixed(layer, of_layer, max_length, layers))
    return layers


class MoACache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A cache for `generate` and `forward` of a model under a plan.

    Layers that hold no growing keys (linear attention) stay as transformers makes them.

    Args:
        config: Configuration of the model.
        plan: The plan applied to it: a `Plan`, its file, or the content of such a file.
        max_length: Tokens per sample, prompt and answer together, for a cache of fixed size: what `torch.compile` and
            CUDA graphs need. None for one that grows.

    Attributes:
        fingerprint: Of the plan.

    Raises:
        ConfigError: The plan's rules aren't anchored at positions, ``max_length`` isn't positive, or there's no such
            file.
        PlanFormatError: The file or content is no valid plan.
        ModelMismatchError: The plan was made for another model.
        ModelUnsupportedError: The model can't follow a plan.
    """

    fingerprint: str

    def __init__(self, config: Any, plan: PlanLike, *, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length is {max_length} tokens; it must be positive, or None for a cache that grows")
        plan = Plan.of(plan)
        super().__init__(layers=_layers(layer_rules(plan, config), config, max_length))
        self.fingerprint = plan.fingerprint

    @classmethod
    def following(
        cls, rules: Sequence[LayerRules], config: Any, fingerprint: str, *, max_length: int | None = None
    ) -> MoACache:
        """A cache by rules that were read off a plan already, as every `generate` needs one.

        Args:
            rules: Of every layer.
            config: Configuration of the model.
            fingerprint: Of the plan.
            max_length: As for the class.
        """
        return cls.of_layers(_layers(rules, config, max_length), fingerprint)

    @classmethod
    def of_layers(cls, layers: list[Any], fingerprint: str) -> MoACache:
        """A cache of these layers, under the plan of that fingerprint."""
        cache = cls.__new__(cls)
        Cache.__init__(cache, layers=layers)
        cache.fingerprint = fingerprint
        return cache

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], plan: PlanLike, *, model: Any = None, device: str | torch.device = "cpu"
    ) -> MoACache:
        """Read a cache that `save` wrote; it goes on to the bit as the saved one would have.

        Args:
            path: The file.
            plan: The plan that it was filled under, as for the class.
            model: The model that filled it: its weights are compared with those that `save` was told, and each layer
                is put where the model's layer is.
            device: Where to put it without ``model``.

        Raises:
            ConfigError: There is no such file, no such device, or ``model`` is given and `save` wasn't told whose
                weights filled the cache.
            CacheVersionError: The schema is of another version.
            CacheFormatError: The file is truncated, foreign or damaged.
            PlanFormatError: The plan is damaged.
            ModelMismatchError: The cache was filled under another plan, or by other weights.
        """
        return saving.load(path, Plan.of(plan), model, device)

    def save(self, path: str | os.PathLike[str], *, model: Any = None) -> None:
        """Write the cache to one safetensors file, atomically, with the plan's fingerprint.

        Args:
            path: The file.
            model: The model that filled it; `load` can then tell whether its model has the same weights.

        Raises:
            ConfigError: It can't be written there.
            UnsupportedInputError: It is empty, half filled by a pass that failed, of fixed size, or has states of
                linear attention.
        """
        saving.save(self, path, model)

    @classmethod
    def merge(cls, caches: Sequence[MoACache]) -> MoACache:
        """One cache for a batch out of several caches under one plan; they stay as they are.

        Samples of different lengths then are a batch padded on the left: pass ids and an ``attention_mask`` that are as
        long as the longest sample and the new tokens.

        Args:
            caches: In the order of the batch, each of one sample or more.

        Raises:
            UnsupportedInputError: They are of different plans, types or devices, or as for `save`.
        """
        return batching.merge(caches)

    def take(self, *samples: int) -> MoACache:
        """A cache of its own for some samples of a batch, without their padding; this one stays as it is.

        Args:
            *samples: Indices in the batch.

        Raises:
            UnsupportedInputError: There is no such sample, or as for `save`.
        """
        return batching.take(self, samples)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As every cache's; refuses what an earlier pass left half done, which would silently give other tokens.

        Lengths of layers of fixed size lie on their device, and are looked at on a CPU only.

        Raises:
            UnsupportedInputError: The layers don't hold the same tokens.
        """
        layer = self.layers[layer_idx]
        if isinstance(layer, MoACacheLayer) and not torch.compiler.is_compiling():
            # The first of them has stored this pass's tokens already.
            first = next(other for other in self.layers if isinstance(other, MoACacheLayer))
            known = not layer.is_compileable or key_states.device.type == "cpu"
            if known and first is not layer and layer.get_seq_length() + key_states.shape[2] != first.get_seq_length():
                raise UnsupportedInputError(
                    "the layers of the MoACache hold different numbers of tokens: an earlier forward pass failed or "
                    "was interrupted midway; reset() the cache"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def copy(self) -> MoACache:
        """A cache of its own with the same tokens: fill one with a prefix, then continue copies of it.

        Rules are anchored at positions, so a continued copy is exactly what a run of the whole would give.
        """
        return copy.deepcopy(self)

    def describe(self) -> CacheReport:
        """What every layer and KV head holds, in bytes and beside a dense cache; ``print`` it for a table."""
        return CacheReport(
            tuple(
                LayerReport(
                    layer=index,
                    batch=len(layer.lens),
                    length=int(layer.get_seq_length()) if not layer.is_compileable else layer.get_max_length(),
                    capacities=layer.layout.capacities,
                    token_bytes=layer.keys.itemsize * (layer.keys.shape[-1] + layer.values.shape[-1]),
                    nbytes=layer.nbytes,
                    device=str(layer.keys.device),
                )
                for index, layer in enumerate(self.layers)
                if isinstance(layer, MoACacheLayer) and layer.is_initialized
            )
        )

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values in the layers that follow the plan."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, MoACacheLayer))

    def activate_past_recording(self, tokens: int = ROLLBACK_TOKENS) -> None:
        """Keep room for rollbacks of up to ``tokens`` tokens from now on, or of more if that was asked for before."""
        for layer in self.layers:
            if isinstance(layer, MoACacheLayer):
                layer.activate_past_recording(tokens)
            elif hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens in every layer, or, where one refuses, in none; see `MoACacheLayer.crop`."""
        for layer in self.layers:
            if isinstance(layer, MoACacheLayer):
                layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
