"""Swapping the attention of a model's text decoder, and nothing else's."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moa_search.errors import ModelUnsupportedError
from moa_search.modeling.private import attention_of
from moa_search.modeling.support import require_attention_interface
from moa_search.modeling.text import attention_modules, text_config, text_decoders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an attention function and its mask function known to transformers; without the latter there is no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def set_attention(model: Any, name: str | None) -> None:
    """Set the attention implementation of a model's text decoder; vision and audio towers keep theirs.

    Args:
        model: A transformers model.
        name: What was registered, or transformers' own; None for transformers' default.

    Raises:
        ModelUnsupportedError: The model refuses it.
    """
    require_attention_interface(model)
    # Asked of the decoder, for transformers would change the towers within a model, too.
    text_decoders(model)[0].set_attn_implementation({"": name})
    if name is not None and attention_of(text_config(model.config)) != name:
        raise ModelUnsupportedError(f"{type(model).__name__}: its attention function can't be replaced")


def attention_choice(model: Any, name: str) -> Any:
    """What a model's configuration has to say for `from_pretrained` to load its text decoder, alone, with ``name``.

    Raises:
        ModelUnsupportedError: The text decoder's configuration is no part of the model's.
    """
    config, text = model.config, text_config(model.config)
    if text is config:
        return {"": name} if config.sub_configs else name
    path = _path(config, text)
    if path is None:
        raise ModelUnsupportedError(f"{type(model).__name__}: its text decoder isn't part of its configuration")
    choice: Any = name
    for key in reversed(path):
        choice = {key: choice}
    return choice


@contextmanager
def swapped(model: Any, name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[list[Any]]:
    """Run a model's text decoder with another attention function for the duration of a ``with`` block.

    Args:
        model: A transformers model.
        name: Under which both functions are registered with transformers.
        attention: As for ``transformers.AttentionInterface``.
        mask: As for ``transformers.AttentionMaskInterface``.

    Yields:
        The text decoder's attention modules.

    Raises:
        ModelUnsupportedError: The model refuses it.
    """
    before = attention_of(text_config(model.config))
    register(name, attention, mask)
    try:
        set_attention(model, name)
        yield attention_modules(model)
    finally:
        if attention_of(text_config(model.config)) != before:
            set_attention(model, before)


def _path(config: Any, wanted: Any) -> list[str] | None:
    """Keys that lead from a configuration to one within it."""
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is wanted:
            return [key]
        deeper = None if part is None else _path(part, wanted)
        if deeper is not None:
            return [key, *deeper]
    return None
