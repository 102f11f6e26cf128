"""What a cache hands to the attention function in place of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.errors import UnsupportedInputError

if TYPE_CHECKING:
    import torch

    from moa_search.runtime.layer import MoACacheLayer

FOREIGN_ATTENTION = (
    "a MoACache works only with the plan's own attention: call apply_plan(model, plan) first; a model that changes "
    "keys or values after they went through the cache can't use one"
)


class Staged:
    """New keys and values on their way to the attention function, in place of tensors.

    Not a tensor on purpose: storing the new tokens before attention has read the ring would overwrite keys
    that this very chunk needs, and any other attention function fails on it instead of attending only a part
    of the past.

    Attributes:
        layer: The cache layer that they belong to.
    """

    def __init__(self, layer: MoACacheLayer, key: torch.Tensor, value: torch.Tensor) -> None:
        self.layer = layer
        self._states: tuple[torch.Tensor, torch.Tensor] | None = (key, value)

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values ``[batch, kv_heads, new tokens, head_dim]``; only once.

        Raises:
            UnsupportedInputError: They were taken before.
        """
        if self._states is None:
            raise UnsupportedInputError("one layer's keys and values are attended by two layers; a plan can't run that")
        states, self._states = self._states, None
        return states

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnsupportedInputError(FOREIGN_ATTENTION)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse to be an argument of any torch function."""
        raise UnsupportedInputError(FOREIGN_ATTENTION)
