"""Gradient checkpointing without training mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from moa_search.errors import ConfigError
from moa_search.modeling.private import CHECKPOINTING_FUNCTION


@contextmanager
def checkpointed(model: Any, enabled: bool) -> Iterator[None]:
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
        CHECKPOINTING_FUNCTION: partial(checkpoint, use_reentrant=False),
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
