"""Run calibration samples through a model and gather its influence statistics."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moa_search.calibration import Sample, hash_samples
from moa_search.errors import ConfigError, ModelUnsupportedError, ProfilingError
from moa_search.formats.profile import LengthProfile, Profile, ProfileHeader
from moa_search.formats.signature import ModelSignature
from moa_search.models import require_causal, require_context
from moa_search.profiling.accumulate import LengthAccumulator
from moa_search.profiling.attention import Recorder, observed, record_into
from moa_search.profiling.grid import ROW_BUCKETS, window_grid
from moa_search.spans import BLOCK_TOKENS, SINK_TOKENS

__all__ = ["Progress", "profile_samples"]

Progress = Callable[[int, int], None]
"""Called after each sample with the tokens done and the tokens in all."""


def profile_samples(
    model: Any,
    samples: Sequence[Sample],
    *,
    model_name: str = "",
    sink: int = SINK_TOKENS,
    block: int = BLOCK_TOKENS,
    row_buckets: int = ROW_BUCKETS,
    checkpointing: bool = True,
    seed: int = 0,
    calibration: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure the influence of shorter windows on every KV head.

    One forward and backward pass per sample, parameters without gradients; memory is linear in the length.

    Args:
        model: A transformers causal language model; its attention implementation is put back at the end.
        samples: Prompts with answers; all samples of one length are pooled.
        model_name: Recorded in the profile.
        sink: First tokens that no window ever drops.
        block: Smallest window in tokens.
        row_buckets: Equal slices of the rows.
        checkpointing: Keep one layer's activations at a time and recompute the rest: less memory, about a
            third more time.
        seed: Recorded in the profile.
        calibration: Where the samples come from, recorded in the profile.
        progress: Told after each sample.

    Raises:
        ModelUnsupportedError: The model's attention can't be observed.
        ConfigError: A sample is longer than the model's context.
        ProfilingError: A loss isn't finite.
    """
    if not samples:
        raise ConfigError("there are no calibration samples to profile")
    require_causal(model.config)
    signature = ModelSignature.of(model.config)
    require_context(model.config, max(sample.length for sample in samples))
    gathered: dict[int, LengthAccumulator] = {}
    total, done = sum(sample.length for sample in samples), 0
    with observed(model) as modules, _checkpointed(model, checkpointing):
        for number, sample in enumerate(samples):
            recorder = Recorder(window_grid(sample.length, block), row_buckets, sink)
            record_into(modules, recorder)
            loss = _backward(model, sample)
            if not math.isfinite(loss):
                raise ProfilingError(
                    f"the loss of sample {number} ({sample.task}, {sample.length} tokens) is {loss}; "
                    "try --dtype float32, or check the model's weights"
                )
            statistics = _stack(recorder, signature, model)
            pool = gathered.setdefault(sample.length, LengthAccumulator(sample.length, recorder.windows, row_buckets))
            pool.add(loss, statistics)
            done += sample.length
            if progress is not None:
                progress(done, total)
    by_length = {length: pool.result() for length, pool in sorted(gathered.items())}
    header = _header(
        model,
        samples,
        by_length,
        calibration,
        model=signature,
        model_name=model_name,
        sink=sink,
        block=block,
        seed=seed,
    )
    return Profile(header, by_length)


def _backward(model: Any, sample: Sample) -> float:
    """Loss over the answer in nats per token, with its gradients sent back through the activations."""
    ids = torch.from_numpy(sample.ids)[None].to(model.device)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=sample.answer_tokens + 1).logits
    predicted = logits[0, -sample.answer_tokens - 1 : -1].float()
    loss = functional.cross_entropy(predicted, ids[0, -sample.answer_tokens :])
    loss.backward()
    return loss.item()


def _stack(recorder: Recorder, signature: ModelSignature, model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """One sample's statistics as ``[layer, kv_head, bucket, window]``."""
    missing = sorted(set(range(signature.num_hidden_layers)) - set(recorder.layers))
    if missing:
        raise ModelUnsupportedError(
            f"{type(model).__name__}: layers {missing} never called the attention interface, so they can't be profiled"
        )
    first = recorder.layers[0]
    return {
        name: torch.stack([recorder.layers[i][name] for i in range(signature.num_hidden_layers)]).numpy()
        for name in first
    }


@contextmanager
def _checkpointed(model: Any, enabled: bool) -> Iterator[None]:
    """Gradient checkpointing with dropout off.

    transformers checkpoints a decoder layer only while that layer is in training mode, and ``model.train()``
    would switch dropout on; so the flag is set on the decoder layers alone, not on what they contain. Its own
    switch leaves a hook on the embeddings behind.

    Raises:
        ConfigError: The model has no layers that can be recomputed.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if enabled else []
    if enabled and not layers:
        raise ConfigError(f"checkpointing: {type(model).__name__} has no layers to recompute; switch it off")
    switches = {
        "training": True,
        "gradient_checkpointing": True,
        "_gradient_checkpointing_func": partial(checkpoint, use_reentrant=False),
    }
    before = [{name: vars(layer)[name] for name in switches if name in vars(layer)} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(switches)
        yield
    finally:
        for layer, attributes in zip(layers, before, strict=True):
            for name in switches:
                vars(layer).pop(name, None)
            vars(layer).update(attributes)


def _header(
    network: Any,
    samples: Sequence[Sample],
    by_length: dict[int, LengthProfile],
    calibration: dict[str, Any] | None,
    **fields: Any,
) -> ProfileHeader:
    import transformers

    return ProfileHeader(
        dtype=str(network.dtype).removeprefix("torch."),
        calibration={**(calibration or {}), "samples": len(samples), "hash": hash_samples(samples)},
        lengths=tuple(entry.header for entry in by_length.values()),
        versions={
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **fields,
    )
