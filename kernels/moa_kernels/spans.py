"""What every KV head of a layer attends, as the integers that kernels read.

With ``n = i + 1`` tokens of context, the query at position i attends key j iff ``j <= i``, ``j > i - sliding_window``
and (``j < sink`` or ``j > i - window``), where ``window = max(min_span, alpha + ((beta_256 * n) >> 8)) - sink``.
Since ``beta_256 <= 256``, windows never start further back for a later query: kernels bound a tile by its first and
last row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIELDS = ("sink", "min_span", "alpha", "beta_256")
"""Integers per KV head, in the order of `HeadSpans.flat`."""

FOREVER = 2**30
"""A window or span longer than any sequence; kernels compute positions in 32 bits."""


@dataclass(frozen=True)
class HeadSpans:
    """One layer's rules, a tuple of `FIELDS` for each KV head.

    Attributes:
        heads: ``(sink, min_span, alpha, beta_256)`` per KV head. ``sink`` counts in ``min_span`` and ``alpha``.
        sliding_window: The model's own window in tokens, on top of the rules; it hides sink tokens too.

    Raises:
        ValueError: A number is out of its range.
    """

    heads: tuple[tuple[int, int, int, int], ...]
    sliding_window: int = FOREVER

    def __post_init__(self) -> None:
        if not self.heads:
            raise ValueError("HeadSpans needs at least one head")
        for sink, min_span, _, beta_256 in self.heads:
            if not 0 <= sink <= FOREVER or not sink < min_span <= FOREVER:
                raise ValueError(f"0 <= sink < min_span <= 2**30 must hold; sink is {sink}, min_span {min_span}")
            if not 0 <= beta_256 <= 256:
                raise ValueError(f"beta_256 is {beta_256}; it must lie in 0..256")
        if not 1 <= self.sliding_window <= FOREVER:
            raise ValueError(f"sliding_window is {self.sliding_window}; it must lie in 1..2**30")

    @classmethod
    def of(
        cls, rules: Iterable[tuple[int, int]], *, sink: int, min_span: int, sliding_window: int | None = None
    ) -> HeadSpans:
        """The same sink and least span for every head.

        Args:
            rules: ``(alpha, beta_256)`` per KV head.
            sink: First tokens that are always attended.
            min_span: Least span in tokens, the sink included.
            sliding_window: The model's own window in tokens, if it has one.
        """
        heads = tuple((sink, min_span, max(-FOREVER, min(alpha, FOREVER)), beta_256) for alpha, beta_256 in rules)
        return cls(heads, FOREVER if sliding_window is None else min(sliding_window, FOREVER))

    @classmethod
    def dense(cls, kv_heads: int) -> HeadSpans:
        """Plain causal attention."""
        return cls.of([(0, 256)] * kv_heads, sink=0, min_span=1)

    @classmethod
    def from_flat(cls, flat: Sequence[int], sliding_window: int) -> HeadSpans:
        """The inverse of `flat`, for operators, which take lists of integers only."""
        return _from_flat(tuple(flat), sliding_window)

    @property
    def flat(self) -> list[int]:
        """All heads' `FIELDS` in a row."""
        return [number for head in self.heads for number in head]

    def tensor(self, device: torch.device) -> Tensor:
        """int32 ``[kv_heads, 4]``, made once per device: a CUDA graph may capture it."""
        kept: dict[torch.device, Tensor] = self.__dict__.setdefault("_by_device", {})
        if device not in kept:
            kept[device] = _tensor(self, device)  # layers with equal rules share it
        return kept[device]

    def oldest_key(self, position: Tensor) -> Tensor:
        """Where windows start, the sink aside.

        Args:
            position: int64 positions of queries, any shape.

        Returns:
            ``[kv_heads, *position.shape]``; beyond the query itself where the window is empty.
        """
        # [kv_heads, 1, ...] each
        sink, min_span, alpha, beta_256 = (
            torch.tensor(column, device=position.device).view(-1, *[1] * position.ndim)
            for column in zip(*self.heads, strict=True)
        )
        window = (alpha + ((beta_256 * (position + 1)) >> 8)).clamp(min=min_span) - sink
        return position + 1 - window.clamp(max=self.sliding_window)

    def visible(self, query_at: Tensor, key_at: Tensor) -> Tensor:
        """Which keys each query attends.

        Args:
            query_at: int64 positions ``[..., query]``.
            key_at: int64 positions ``[..., key]`` with the same leading dimensions.

        Returns:
            Boolean ``[kv_heads, ..., query, key]``.
        """
        # [..., query, 1] and [..., 1, key]
        i, j = query_at[..., None], key_at[..., None, :]
        sink = torch.tensor([head[0] for head in self.heads], device=i.device).view(-1, *[1] * i.ndim)
        near = j >= self.oldest_key(query_at)[..., None]
        return (j >= 0) & (j <= i) & (j > i - self.sliding_window) & (near | (j < sink))


@functools.lru_cache(maxsize=4096)
def _from_flat(flat: tuple[int, ...], sliding_window: int) -> HeadSpans:
    heads = tuple(tuple(flat[start : start + len(FIELDS)]) for start in range(0, len(flat), len(FIELDS)))
    return HeadSpans(heads, sliding_window)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _tensor(spans: HeadSpans, device: torch.device) -> Tensor:
    return torch.tensor(spans.heads, dtype=torch.int32, device=device)
