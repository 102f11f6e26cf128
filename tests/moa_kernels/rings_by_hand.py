"""Ragged caches written token by token, and whole histories under explicit masks: what kernels are held against."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from moa_kernels.rings import RingLayout
from moa_kernels.spans import FOREVER, HeadSpans
from torch import Tensor

from .yardstick import DEVICE, Masked, randn

_empty = torch.empty


def poisoned_empty(*args: object, **kwargs: object) -> Tensor:
    """`torch.empty` as bad as it can be: NaN, or indices far out of bounds."""
    fresh = _empty(*args, **kwargs)
    return fresh.fill_(float("nan") if fresh.is_floating_point() else 2**30)


@dataclass
class Case:
    """A random layer in the middle of decoding.

    Attributes:
        history: Keys and values of all tokens ever, each ``[batch, kv_heads, tokens, head_dim]``.
    """

    query: Tensor
    history: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor
    lens: list[int]
    layout: RingLayout
    spans: HeadSpans
    softcap: float | None
    sink_logits: Tensor | None
    scale: float | None

    @classmethod
    def drawn(
        cls,
        seed: int,
        dtype: torch.dtype,
        longest: int = 90,
        head_dims: tuple[int, ...] = (1, 8, 16, 20, 24, 32, 40, 64),
    ) -> Case:
        """Odd shapes, spans of every kind, samples of very different lengths, a poisoned cache."""
        draw = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        batch, kv_heads, group = draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 3, 8])
        new, head_dim = draw.choice([1, 1, 1, 2, 3, 5, 8]), draw.choice(head_dims)
        lens = [draw.choice([0, 1, new, draw.randint(0, longest), longest]) for _ in range(batch)]
        most = max(*lens, 1)
        sliding_window = draw.choice([FOREVER, FOREVER, FOREVER, 1, 13, 40])
        heads = []
        for _ in range(kv_heads):
            sink = draw.choice([0, 0, 1, 4, 17, 2 * longest])
            window = draw.choice([1, 1, 7, 16, 33, 2 * longest])
            alpha, beta_256 = draw.choice([(0, 0), (sink + 5, 0), (3, 64), (sink, 128), (-20, 200), (0, 256)])
            heads.append((sink, sink + window, alpha, beta_256))
        spans = HeadSpans(tuple(heads), sliding_window)
        spare = [draw.choice([0, 0, 1, 9]) for _ in heads]
        capacities = [
            min(head[0] + max(window_of(head, most), 1) + new - 1 + extra, most + extra)
            for head, extra in zip(heads, spare, strict=True)
        ]
        layout = RingLayout(tuple(capacities), tuple(head[0] for head in heads))
        history = tuple(randn(generator, batch, kv_heads, most, head_dim, dtype=dtype) for _ in range(2))
        keys, values = written(history, lens, layout, wide=draw.random() < 0.3)
        return cls(
            query=randn(generator, batch, new, kv_heads * group, head_dim, dtype=dtype).transpose(1, 2),
            history=history,
            keys=keys,
            values=values,
            lens=lens,
            layout=layout,
            spans=spans,
            softcap=draw.choice([None, None, 2.5, 30.0]),
            sink_logits=randn(generator, kv_heads * group, dtype=dtype) if draw.random() < 0.3 else None,
            scale=draw.choice([None, None, 0.3]),
        )

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, RingLayout, HeadSpans]:
        """What `span_decode` takes by position."""
        lens = torch.tensor(self.lens, device=DEVICE)
        return self.query, self.keys, self.values, lens, self.layout, self.spans

    @property
    def options(self) -> dict[str, object]:
        """What it takes by name."""
        return {"softcap": self.softcap, "sink_logits": self.sink_logits, "scale": self.scale}

    def masked(self) -> Masked:
        """Attention of the newest tokens over the whole history, by a mask written out entry by entry."""
        visible = visible_to(self.query.shape[2], self.lens, self.spans, self.history[0].shape[2])
        return Masked(self.query, *self.history, visible, self.scale, self.softcap, self.sink_logits)


def written(
    history: tuple[Tensor, Tensor], lens: list[int], layout: RingLayout, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """A cache of NaN into which the histories were stored one token after the other.

    Args:
        history: Keys and values, ``[batch, kv_heads, tokens, head_dim]``.
        lens: Tokens stored per sample.
        layout: Where they go.
        wide: Whether the cache is part of a larger buffer.
    """
    caches = []
    for states in history:
        batch, _, _, dim = states.shape
        buffer = torch.full((batch, layout.slots + 2, dim + 3 * wide), float("nan"), dtype=states.dtype, device=DEVICE)
        cache = buffer[:, 2:, :dim] if wide else buffer[:, 2:].contiguous()
        for sample, length in enumerate(lens):
            first = 0
            for head, (capacity, sink) in enumerate(zip(layout.capacities, layout.sinks, strict=True)):
                slots: dict[int, int] = {}
                for position in range(length):
                    slot = position
                    while slot >= sink and slot >= capacity > sink:
                        slot -= capacity - sink
                    if slot < capacity:
                        slots[slot] = position
                for slot, position in slots.items():
                    cache[sample, first + slot] = states[sample, head, position]
                first += capacity
        caches.append(cache)
    return caches[0], caches[1]


def window_of(rule: tuple[int, int, int, int], context: int) -> int:
    sink, min_span, alpha, beta_256 = rule
    return max(min_span, alpha + beta_256 * context // 256) - sink


def visible_to(new: int, lens: list[int], spans: HeadSpans, tokens: int) -> Tensor:
    """What the newest tokens attend, written out entry by entry: boolean ``[batch, kv_heads, new, tokens]``."""
    visible = torch.zeros(len(lens), len(spans.heads), new, tokens, dtype=torch.bool)
    for sample, length in enumerate(lens):
        for head, rule in enumerate(spans.heads):
            for row in range(new):
                at = length - new + row
                seen = [j for j in range(at + 1) if attends(rule, spans.sliding_window, at, j)]
                visible[sample, head, row, seen] = True
    return visible.to(DEVICE)


def attends(rule: tuple[int, int, int, int], sliding_window: int, query: int, key: int) -> bool:
    if query - key >= sliding_window:
        return False
    return key < rule[0] or query - key < window_of(rule, query + 1)
