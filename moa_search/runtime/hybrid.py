"""The cache of a layer that attends and, side by side, carries convolutions or recurrences (Falcon H1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import LinearAttentionLayer

from moa_search.runtime.coded import CodedCacheLayer
from moa_search.runtime.layer import ROLLBACK_TOKENS, MoACacheLayer

if TYPE_CHECKING:
    import torch

    from moa_search.runtime.rules import LayerRules


class MoAHybridCacheLayer(LinearAttentionLayer, MoACacheLayer):  # type: ignore[misc]  # transformers is untyped
    """Keys and values as in a `MoACacheLayer`, and transformers' own states of linear attention.

    Args:
        rules: What the layer's heads attend.
        number_of_states: States of linear attention.

    Attributes:
        attention: What keeps keys and values.
    """

    is_compileable = False
    attention: type[MoACacheLayer] = MoACacheLayer

    def __init__(self, rules: LayerRules, number_of_states: int) -> None:
        self.attention.__init__(self, rules)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *states: torch.Tensor, **linear: Any) -> None:
        """Of keys and values, which come without names, or else of a state of linear attention."""
        if states:
            self.attention.lazy_initialization(self, *states)
        else:
            LinearAttentionLayer.lazy_initialization(self, **linear)

    def activate_past_recording(self, tokens: int = ROLLBACK_TOKENS) -> None:
        """Keep room for rollbacks of so many tokens from now on."""
        LinearAttentionLayer.activate_past_recording(self)
        self.attention.activate_past_recording(self, tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.attention.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; only keys and values free their memory."""
        LinearAttentionLayer.reset(self)
        self.attention.reset(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sample i a copy of sample ``beam_idx[i]``."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.attention.reorder_cache(self, beam_idx)


class CodedHybridCacheLayer(MoAHybridCacheLayer, CodedCacheLayer):
    """The same, whose heads keep codes."""

    attention = CodedCacheLayer
