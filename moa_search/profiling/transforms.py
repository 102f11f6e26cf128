"""The transforms under which keys are stored in few bits, from means and second moments over samples."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from moa_kernels.codes import Moments, Rotary
from torch import Tensor

from moa_search.data import Sample
from moa_search.errors import ProfilingError
from moa_search.formats import ModelSignature
from moa_search.formats.transforms import KeyTransforms
from moa_search.modeling.attention import swapped
from moa_search.modeling.rope import constant_rope_tokens
from moa_search.modeling.text import context_length
from moa_search.profiling.attention import dense, no_mask
from moa_search.profiling.rotary import SHIFTS, TOKENS, rotary_of
from moa_search.progress import progress

logger = logging.getLogger(__name__)

IMPLEMENTATION = "moa_moments"
"""Name under which the function is registered with transformers."""

MOMENT_SAMPLES = 16

UNMEASURED = "keys don't turn with positions as rotary embedding does; bits will keep them less precisely"


def measure_transforms(model: Any, samples: Sequence[Sample], *, sink: int, native: dict[int, int]) -> KeyTransforms:
    """Rotary embedding, means, balancing matrices and spectra of keys, by forward passes alone.

    Args:
        model: A transformers causal language model.
        samples: The shortest `MOMENT_SAMPLES` of them are run.
        sink: First tokens, which stay in 16 bits and don't count.
        native: Layers that have a sliding window of their own, in tokens; their transforms do nothing.

    Raises:
        ModelUnsupportedError: The model's attention can't be observed.
        ProfilingError: A layer's keys or queries aren't finite, or no sample is longer than the sink.
    """
    signature = ModelSignature.of(model.config)
    chosen = sorted(samples, key=lambda sample: sample.target_length)[:MOMENT_SAMPLES]
    frequencies, order = _rotary(model, chosen[0], signature, sink, native)
    gathered: dict[int, Moments] = {}

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        positions = torch.arange(key.shape[1], device=key.device)
        rotary = Rotary(frequencies[layer], order).to(key.device)
        query, key = (rotary.turn(x, positions, back=True)[:, sink:] for x in (query, key))
        moments = Moments.of(query, key, value[:, sink:])
        gathered[layer] = gathered[layer] + moments if layer in gathered else moments

    with _watched(model, native, observe):
        for sample in progress(chosen, what="Measuring keys", unit="sample"):
            _run(model, sample.ids)
    heads, width = signature.num_key_value_heads, signature.head_dim
    mean = np.zeros((signature.num_hidden_layers, heads, width), dtype=np.float32)
    balance = np.broadcast_to(np.eye(width, dtype=np.float32), (*mean.shape, width)).copy()
    spectrum = np.ones_like(mean)
    for layer, moments in gathered.items():
        try:
            found = moments.key_statics()
        except ValueError as error:
            raise ProfilingError(
                f"layer {layer}: keys have no transform ({error}); try --dtype float32, longer --lengths, or check the "
                "model's weights"
            ) from None
        balance[layer], mean[layer], spectrum[layer] = (part.cpu().numpy() for part in found)
    return KeyTransforms(mean, balance, frequencies.float().numpy(), order.int().numpy(), spectrum)


def _rotary(
    model: Any, sample: Sample, signature: ModelSignature, sink: int, native: dict[int, int]
) -> tuple[Tensor, Tensor]:
    """Frequencies ``[layer, width / 2]`` and order ``[width]``; no frequencies where a model has none or hides them."""
    layers, width = signature.num_hidden_layers, signature.head_dim
    none = torch.zeros(layers, width // 2, dtype=torch.float64), torch.arange(width)
    if not signature.rope or "position_ids" not in inspect.signature(model.forward).parameters:
        return none
    ids = sample.ids[:TOKENS]
    tokens = (constant_rope_tokens(model.config), context_length(model.config), len(ids) + SHIFTS[-1])
    context = min(limit for limit in tokens if limit is not None)
    shifts = [shift for shift in SHIFTS if shift + len(ids) <= context]
    if not shifts:
        logger.warning(UNMEASURED)
        return none
    keys: dict[int, dict[int, Tensor]] = {}
    for shift in (0, *shifts):
        seen = keys.setdefault(shift, {})

        def observe(layer: int, query: Tensor, key: Tensor, value: Tensor, seen: dict[int, Tensor] = seen) -> None:
            seen[layer] = key[:, sink:].cpu()

        with _watched(model, native, observe):
            _run(model, ids, first=shift)
    which = sorted(keys[0])
    found, order = rotary_of({shift: torch.stack([seen[layer] for layer in which]) for shift, seen in keys.items()})
    frequencies = none[0].index_copy(0, torch.tensor(which), found)
    if not found.any():
        logger.warning(UNMEASURED)
    return frequencies, order


def _watched(model: Any, native: dict[int, int], observe: Any) -> Any:
    """The model attends as it does, and ``observe`` gets queries, keys and values of each layer that isn't native."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        out, _, window = dense(module, query, key, value, native, **kwargs)
        if window is None:
            observe(module.layer_idx, query[0], key[0], value[0])
        return out.transpose(0, 1)[None].contiguous(), None

    return swapped(model, IMPLEMENTATION, attention, no_mask)


def _run(model: Any, ids: Any, first: int = 0) -> None:
    """Forward pass of tokens whose first one stands at a position."""
    tokens = torch.from_numpy(ids)[None].to(model.get_input_embeddings().weight.device)
    options: dict[str, Any] = {}
    if first:
        options["position_ids"] = torch.arange(first, first + len(ids), device=tokens.device)[None]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False, logits_to_keep=1, **options)
