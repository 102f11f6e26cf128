"""KVzip: its scores are found once for a context; each variant and share masks by them."""

from __future__ import annotations

import time
from typing import Any

import torch

from .reading import Read, attentions, cache_bytes


class KVzip:
    """KVzip's variants on one context."""

    def __init__(self, model: Any, tokenizer: Any, read: Read) -> None:
        self._model, self._tokenizer, self._read = model, tokenizer, read
        self._press: Any = None

    def masked(self, name: str, share: float) -> tuple[Any, dict[str, float]]:
        """A cache as `Read.replayed` returns it, of which a variant has masked all but a share."""
        if self._press is None:
            self._score()
        else:
            self._read.spared_s += self._seconds
        press = self._press
        press.compression_ratio, press.layerwise = 1 - share, name == "kvzip-layer"
        if name == "kvzip-head":
            _mask_per_head(self._model, press.score_val, press.n_sink, 1 - share)
        else:
            press.compress_post(self._model)
        cache, found = self._read.replayed()
        found["peak"] = round(self._watch.peak / self._read.dense, 6)
        found["extra_passes"] = round(self._watch.read / len(self._read.tokens), 6)
        return cache, found

    def _score(self) -> None:
        from kvpress.presses.kvzip_press import KVzipPress

        started = time.process_time()
        press = KVzipPress()  # of no ratio: nothing is masked yet
        press._context_ids, press._cache = self._read.ids, self._read.cache()
        # What follows a context in KVzip's own prompt where there is no chat template; items are plain text.
        press._suffix_ids = self._tokenizer.encode("\n", return_tensors="pt", add_special_tokens=False)
        self._watch = Watch(self._model, press._cache)
        with self._watch:
            press._perform_kvzip_compression(self._model, self._tokenizer)
        press.score_val = press.score_val.cpu()  # where what is masked is chosen: layer by layer, it would wait
        self._press, self._seconds = press, time.process_time() - started
        self._read.forget_masks()


class Watch:
    """Bytes of a cache at most, and tokens read, while a model goes on with it.

    Attributes:
        peak: Bytes.
        read: Tokens.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self._layers, self._cache = attentions(model), cache
        self.peak = self.read = 0

    def __enter__(self) -> Watch:
        # Registered before a press's own hooks: a layer is looked at as attention leaves it.
        self._hooks = [layer.register_forward_hook(self._look, with_kwargs=True) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, module: Any, arguments: Any, options: dict[str, Any], output: Any) -> None:
        self.peak = max(self.peak, cache_bytes(self._cache))
        if module is self._layers[0]:
            self.read += options["hidden_states"].shape[1]


def _mask_per_head(model: Any, scores: Any, sink: int, ratio: float) -> None:
    """Mask the same number of tokens in every head, by scores ``[layer, 1, kv_head, token]``."""
    scores[..., :sink] = scores.amax() + 1
    pruned = int(scores.shape[-1] * ratio)
    for layer, of_layer in zip(attentions(model), scores, strict=True):
        indices = torch.topk(-of_layer[0].float(), pruned, dim=-1).indices  # [kv_head, pruned]
        heads = torch.arange(len(indices)).repeat_interleave(pruned)
        layer.masked_key_indices = (torch.zeros_like(heads), heads, indices.flatten())
