"""The transforms under which keys are stored in few bits, from means and second moments over samples.

Rotary embedding turns a mean as it turns keys. A mean over short samples at the first positions is wrong further on:
with moments of 2k positions, keys of 2 bits lost more at 4k than under a rotation alone. So samples are spread over all
positions that the transforms are meant for, the more of them the lower the position, since every context has low ones.
Their attention doesn't change, for scores depend on distances only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from moa_kernels.codes import Moments
from torch import Tensor

from moa_search.data import Sample
from moa_search.errors import ProfilingError
from moa_search.formats import ModelSignature
from moa_search.modeling.attention import swapped
from moa_search.profiling.attention import dense, no_mask
from moa_search.progress import progress

IMPLEMENTATION = "moa_moments"
"""Name under which the function is registered with transformers."""

MOMENT_SAMPLES = 16

Arrays = dict[str, npt.NDArray[np.float32]]


def measure_transforms(
    model: Any, samples: Sequence[Sample], *, sink: int, native: dict[int, int], positions: int
) -> Arrays:
    """Means and balancing matrices of keys, by forward passes alone.

    Args:
        model: A transformers causal language model.
        samples: The shortest `MOMENT_SAMPLES` of them are run, those of one length in turn.
        sink: First tokens, which stay in 16 bits and don't count.
        native: Layers that have a sliding window of their own, in tokens; they get zeros and identities.
        positions: Tokens of the longest context that the transforms are meant for.

    Returns:
        ``mean``, ``[layer, kv_head, head_dim]``, and ``balance``, ``[layer, kv_head, head_dim, head_dim]``.

    Raises:
        ModelUnsupportedError: The model's attention can't be observed.
        ProfilingError: A layer's keys or queries aren't finite, or no sample is longer than the sink.
    """
    signature = ModelSignature.of(model.config)
    gathered: dict[int, Moments] = {}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        out, _, window = dense(module, query, key, value, native, **kwargs)
        if window is None:
            moments = Moments.of(query[0, :, sink:], key[0, :, sink:], value[0, :, sink:])
            layer = module.layer_idx
            gathered[layer] = gathered[layer] + moments if layer in gathered else moments
        return out.transpose(0, 1)[None].contiguous(), None

    chosen = sorted(samples, key=lambda sample: sample.target_length)[:MOMENT_SAMPLES]
    shifts = bool(signature.rope) and "position_ids" in inspect.signature(model.forward).parameters
    with swapped(model, IMPLEMENTATION, attention, no_mask), torch.no_grad():
        for number, sample in enumerate(progress(chosen, what="Measuring keys", unit="sample")):
            ids = torch.from_numpy(sample.ids)[None].to(model.get_input_embeddings().weight.device)
            options: dict[str, Any] = {}
            if shifts:
                first = first_position(number / max(len(chosen) - 1, 1), sample.length, positions)
                options["position_ids"] = torch.arange(first, first + sample.length, device=ids.device)[None]
            model(input_ids=ids, use_cache=False, logits_to_keep=1, **options)
    return _solved(signature, gathered)


def first_position(share: float, length: int, positions: int) -> int:
    """Where a sample begins: positions p get samples in proportion to ``1 / (p + length)``.

    Uniform ones make the transforms fit the farthest positions best, and each context the less the shorter it is.

    Args:
        share: Of the samples before this one, from 0 for the first to 1 for the last.
        length: Tokens of the sample.
        positions: The last sample ends here.
    """
    last = max(positions - length, 0)
    first: float = length * ((1 + last / length) ** share - 1)
    return round(first)


def _solved(signature: ModelSignature, gathered: dict[int, Moments]) -> Arrays:
    heads, width = signature.num_key_value_heads, signature.head_dim
    mean = np.zeros((signature.num_hidden_layers, heads, width), dtype=np.float32)
    balance = np.broadcast_to(np.eye(width, dtype=np.float32), (*mean.shape, width)).copy()
    for layer, moments in gathered.items():
        try:
            found = moments.key_statics()
        except ValueError as error:
            raise ProfilingError(
                f"layer {layer}: keys have no transform ({error}); try --dtype float32, longer --lengths, or check the "
                "model's weights"
            ) from None
        balance[layer], mean[layer] = (part.cpu().numpy() for part in found)
    return {"mean": mean, "balance": balance}
