"""The text decoder of a model: its configuration, context and attention modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the text decoder; for most models, all of it."""
    return config.get_text_config(decoder=True)


def context_length(config: Any) -> int | None:
    """The longest context in tokens that a model was made for; None where its configuration names none."""
    length: int | None = getattr(text_config(config), "max_position_embeddings", None)
    return length


def dtype_name(model: Any) -> str:
    """Name of a model's type, or a tensor's, such as ``bfloat16``."""
    return str(model.dtype).removeprefix("torch.")


def text_decoders(model: Any) -> list[PreTrainedModel]:
    """The parts of a model that run on its text configuration, outermost first."""
    from transformers import PreTrainedModel

    text = text_config(model.config)
    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text]


def attention_modules(model: Any) -> list[Any]:
    """The text decoder's modules that know their layer (``layer_idx``), none of a vision or audio tower's."""
    return list(
        dict.fromkeys(
            module
            for decoder in text_decoders(model)
            for module in _own_modules(decoder, decoder.config)
            if isinstance(getattr(module, "layer_idx", None), int)
        )
    )


def _own_modules(module: torch.nn.Module, config: Any) -> Iterator[torch.nn.Module]:
    """A module and all within it but the parts that run on another configuration, as a tower in a decoder does."""
    from transformers import PreTrainedConfig

    other = getattr(module, "config", config)
    if isinstance(other, PreTrainedConfig) and other is not config:
        return
    yield module
    for child in module.children():
        yield from _own_modules(child, config)
