"""A context is read once, for all methods: compression doesn't change what that pass computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

SHARE_SCORES = ("streaming-llm", "compactor")
"""Presses whose scores depend on the share of tokens that is kept."""


class Read:
    """A context that was read once, without compression.

    Attributes:
        tokens: Its token ids.
        ids: The same, ``[1, token]``.
        seconds: CPU time of the pass.
        spared_s: CPU time that the method at work would have taken for scores that were there.
        dense: Bytes of its keys and values.
    """

    def __init__(self, model: Any, tokens: list[int]) -> None:
        self.tokens = tokens
        self.ids = torch.tensor([tokens], device=model.device)
        self._config, self._layers = model.config, attentions(model)
        self._calls: list[tuple[dict[str, Any], Any]] = []
        self._scores: dict[tuple[str, float, int], tuple[Any, float]] = {}
        self.spared_s = 0.0
        self._positions = torch.arange(len(tokens))
        for layer in self._layers:
            layer.rotary_emb = model.model.rotary_emb  # as presses put it there
        hooks = [layer.register_forward_hook(self._remember, with_kwargs=True) for layer in self._layers]
        started = time.process_time()
        self._cache = DynamicCache(config=model.config)
        model.model(input_ids=self.ids, past_key_values=self._cache)
        self.seconds = time.process_time() - started
        for hook in hooks:
            hook.remove()
        self.dense = cache_bytes(self._cache)

    def forget_masks(self) -> None:
        """Unmask what a method has masked."""
        for layer in self._layers:
            layer.masked_key_indices = None

    def cache(self) -> Any:
        """A cache of the whole context; what is added to it isn't added to others."""
        cache = DynamicCache(config=self._config)
        for number, layer in enumerate(self._cache.layers):
            cache.update(layer.keys, layer.values, number)
        return cache

    def scored_once(self, name: str, share: float, score: Callable[..., Any]) -> Callable[..., Any]:
        """A press's scores, each layer's worked out once for all methods and shares that have them in common."""
        share = share if name in SHARE_SCORES else 0.0

        def scores(module: Any, *arguments: Any, **options: Any) -> Any:
            key = name, share, int(module.layer_idx)
            if key in self._scores:
                self.spared_s += self._scores[key][1]
            else:
                started = time.process_time()
                self._scores[key] = score(module, *arguments, **options), time.process_time() - started
            return self._scores[key][0].clone()  # AdaKV writes into them

        return scores

    def replayed(self, cache: Any = None, hook: Any = None) -> tuple[Any, dict[str, float]]:
        """A cache that was filled layer by layer, each compressed by a press's hook as attention leaves it.

        Args:
            cache: An empty one; by default one that keeps all.
            hook: Of a press.

        Returns:
            The cache; and in shares of the whole context the tokens that are ``kept``, the bytes that are ``held`` and
            those at the ``peak``.
        """
        cache = DynamicCache(config=self._config) if cache is None else cache
        held = peak = 0
        for number, (layer, (options, output)) in enumerate(zip(self._layers, self._calls, strict=True)):
            whole = self._cache.layers[number]
            cache.update(whole.keys, whole.values, number)
            # Attention has all of this layer's keys and values in hand, whatever the cache makes of them.
            peak = max(peak, held + whole.keys.nbytes + whole.values.nbytes)
            if hook is not None:
                hook(layer, [], {**options, "past_key_values": cache}, output)
            held += _layer_bytes(cache.layers[number])
        counts = [cache.get_seq_length(number) for number in range(len(self._layers))]
        masks = [getattr(layer, "masked_key_indices", None) for layer in self._layers]
        heads = self._config.num_key_value_heads
        self._settle_masks()
        kept = sum(counts) * heads - sum(len(mask[0]) for mask in masks if mask is not None)
        return cache, {
            "kept": round(kept / (len(counts) * heads * len(self.tokens)), 6),
            "held": round(held / self.dense, 6),
            "peak": round(peak / self.dense, 6),
            "extra_passes": 0.0,
        }

    def _settle_masks(self) -> None:
        """Bring what presses have masked to the model's device, in one go."""
        masked = [layer for layer in self._layers if getattr(layer, "masked_key_indices", None) is not None]
        if not masked:
            return
        parts = [torch.stack(layer.masked_key_indices[1:]) for layer in masked]  # each [head or token, masked]
        moved = torch.cat(parts, 1).to(self.ids.device, non_blocking=True)
        for layer, part in zip(masked, moved.split([part.shape[1] for part in parts], 1), strict=True):
            layer.masked_key_indices = (torch.zeros_like(part[0]), *part)

    def _remember(self, module: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        # Each press asks every layer whether these are the first: on a CPU, so that none waits for a GPU.
        self._calls.append(({**options, "cache_position": self._positions}, (output[0], None)))


def attentions(model: Any) -> list[Any]:
    """The attention of every layer."""
    return [layer.self_attn for layer in model.model.layers]


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values, as they are stored."""
    return sum(map(_layer_bytes, cache.layers))


def _layer_bytes(layer: Any) -> int:
    return sum(_nbytes(part) for part in vars(layer).values())


def _nbytes(part: Any) -> int:
    """Bytes of a tensor; of a quantised one, of its codes, scales and shifts."""
    if not isinstance(part, torch.Tensor):
        return 0
    inner = [getattr(part, name, None) for name in ("_data", "_scale", "_shift")]
    if any(isinstance(tensor, torch.Tensor) for tensor in inner):
        return sum(_nbytes(tensor) for tensor in inner)
    return part.nbytes
