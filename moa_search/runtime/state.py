"""What a cache layer holds, apart from the layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerState:
    """What a growing layer holds: saved, cut into samples and joined with others' in this form.

    Attributes:
        tensors: By name, each with the batch first; ``lens`` and ``floor`` among them.
        reserved: Length that the slots are laid out for, in tokens.
        slack: Slots per KV head beyond that, for rollbacks.
        rollback: Tokens that can be rolled back from now on; None where none are recorded.
        seen: Tokens seen, padding included.
        unpadded: Newest tokens since the last padding in any sample.
    """

    tensors: dict[str, torch.Tensor]
    reserved: int
    slack: int
    rollback: int | None
    seen: int
    unpadded: int

    def check(self, kv_heads: int) -> None:
        """Check that counts are possible, as those of a damaged file needn't be.

        Raises:
            KeyError: A tensor is missing.
            ValueError: They aren't.
        """
        lens, floor = self.tensors["lens"], self.tensors["floor"]
        if lens.dtype != torch.int64 or lens.ndim != 1 or not len(lens):
            raise ValueError(f"lens holds {lens.dtype} {tuple(lens.shape)}, expected int64 [batch]")
        if floor.dtype != torch.int64 or floor.shape != (len(lens), kv_heads):
            raise ValueError(f"floor holds {floor.dtype} {tuple(floor.shape)}, expected int64 {(len(lens), kv_heads)}")
        shortest, longest = int(lens.min()), int(lens.max())
        if not 0 <= shortest <= longest <= min(self.reserved, self.seen):
            raise ValueError(f"lens from {shortest} to {longest} of {self.seen} tokens, with room for {self.reserved}")
        if not 0 <= self.unpadded <= shortest or min(self.slack, self.rollback or 0) < 0:
            raise ValueError(f"counts of {self.unpadded}, {self.slack} and {self.rollback} tokens can't be")
