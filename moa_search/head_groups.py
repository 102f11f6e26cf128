"""KV heads that share a block table in a paged cache: which ones, and how many tokens they hold together.

A serving engine with paged memory keeps one block table per group of heads, and its groups are equally large. A group
holds the tokens that any of its heads attends, so like heads belong together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError
from moa_search.spans import SpanRule, span

GROUPS = 9
"""Block tables at most, unless told otherwise: each costs the scheduler time at every step of every request."""

LENGTHS = 4
"""Lengths at which spans are compared: the longest, half of it and so on."""

PADDING = 1.5
"""vLLM fills up a smaller group as long as the largest has less than this many times its heads."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeadGroups:
    """The heads of a plan by block table.

    Attributes:
        group_of: ``[layer][kv_head]``, the group's number.
        envelopes: Per group, rules of which the longest span counts at every length.
        longest: Tokens up to which that holds.
        min_span: Smallest span in tokens.
    """

    group_of: tuple[tuple[int, ...], ...]
    envelopes: tuple[tuple[SpanRule, ...], ...]
    longest: int
    min_span: int

    @property
    def sizes(self) -> list[int]:
        """Heads per group."""
        counts = Counter(group for layer in self.group_of for group in layer)
        return [counts[group] for group in range(len(self.envelopes))]

    def span(self, group: int, length: int) -> int:
        """Tokens that a group holds at a context of ``length`` tokens, blocks aside."""
        return max(span(length, rule, self.min_span) for rule in self.envelopes[group])

    def held(self, length: int) -> float:
        """Share of a dense cache that all groups hold at ``length`` tokens, blocks aside."""
        sizes = self.sizes
        kept = sum(size * self.span(group, length) for group, size in enumerate(sizes))
        return kept / (sum(sizes) * length)


def group_heads(
    rules: Sequence[Sequence[SpanRule]], *, min_span: int, longest: int, groups: int | None = None, ranks: int = 1
) -> HeadGroups:
    """Put like heads together.

    Heads whose rules fall into equal parts as they are, as in plans of ``moa-search --groups``, are grouped by rule,
    and nothing is held that isn't attended.

    Args:
        rules: ``[layer][kv_head]``.
        min_span: Smallest span in tokens.
        longest: Longest context in tokens.
        groups: Groups at most; by default `GROUPS`.
        ranks: Processes that have an equal share of each layer's heads, in order. A group has as many heads on each.

    Raises:
        ConfigError: ``groups`` isn't positive, or the heads of a layer don't fall into ``ranks`` equal shares.
    """
    if uneven := [len(layer) for layer in rules if len(layer) % ranks]:
        raise ConfigError(f"{uneven[0]} KV heads don't fall into {ranks} equal shares")
    if groups is not None and groups < 1:
        raise ConfigError(f"groups is {groups}; it must be at least 1")
    flat = [rule for layer in rules for rule in layer]
    rank_of = np.array([head * ranks // len(layer) for layer in rules for head in range(len(layer))])
    mine = len(flat) // ranks
    most = min(groups or GROUPS, mine)
    size = math.gcd(*Counter(zip(flat, rank_of.tolist(), strict=True)).values())
    if mine // size > most:
        size = _group_size(mine, most)
    lengths = [max(1, longest >> halvings) for halvings in range(LENGTHS)]
    shares = np.array([[span(n, rule, min_span) / n for n in lengths] for rule in flat])
    labels = _like_with_like(shares, size, rank_of).tolist()
    members = [[rule for rule, label in zip(flat, labels, strict=True) if label == k] for k in range(max(labels) + 1)]
    numbers = iter(labels)
    return HeadGroups(
        group_of=tuple(tuple(next(numbers) for _ in layer) for layer in rules),
        envelopes=tuple(envelope(rules, min_span=min_span, longest=longest) for rules in members),
        longest=longest,
        min_span=min_span,
    )


def envelope(rules: Sequence[SpanRule], *, min_span: int, longest: int) -> tuple[SpanRule, ...]:
    """The rules that have the longest span somewhere up to ``longest`` tokens."""
    n = np.arange(1, longest + 1, dtype=np.int64)
    different = list(dict.fromkeys(rules))
    spans = np.stack([span(n, rule, min_span) for rule in different])
    kept: list[SpanRule] = []
    most = np.zeros(len(n), dtype=np.int64)
    for index in np.argsort(-spans.sum(axis=1), kind="stable"):
        if (spans[index] > most).any():
            kept.append(different[index])
            most = np.maximum(most, spans[index])
    return tuple(kept)


def _group_size(heads: int, groups: int) -> int:
    """Heads per group: no more groups than wished, and a last one not so small that vLLM would cut all others to it."""
    size = -(-heads // groups)
    while heads % size and size >= (heads % size) * PADDING:
        size += 1
    return size


def _like_with_like(shares: Floats, size: int, rank_of: Ints) -> Ints:
    """A group for each head ``[head]``: the best of several sorted orders, each with pairs of a rank swapped."""
    found = [_swapped(shares, key, size, rank_of) for key in (shares.mean(axis=1), *shares.T)]
    return min(found, key=lambda pair: pair[0])[1]


def _swapped(shares: Floats, key: Floats, size: int, rank_of: Ints) -> tuple[float, Ints]:
    """Cut each rank's heads, largest first, and swap pairs while less is held; what is held, and the groups."""
    labels = np.empty(len(shares), dtype=np.int64)
    for rank in range(int(rank_of.max()) + 1):
        heads = np.flatnonzero(rank_of == rank)
        labels[heads[np.argsort(-key[heads], kind="stable")]] = np.arange(len(heads)) // size
    count = int(labels.max()) + 1
    held = np.array([shares[labels == group].max(axis=0).sum() for group in range(count)])
    without = _without_each(shares, labels)
    swapped = True
    while swapped:
        swapped = False
        for head, share in enumerate(shares):
            # What this head's group and any other head's hold after the two have changed places.
            after = np.maximum(without[head], shares).sum(axis=1) + np.maximum(without, share).sum(axis=1)
            gain = held[labels[head]] + held[labels] - after
            gain[(labels == labels[head]) | (rank_of != rank_of[head])] = 0
            other = int(gain.argmax())
            if gain[other] > 1e-9:
                labels[head], labels[other] = labels[other], labels[head]
                for group in (labels[head], labels[other]):
                    held[group] = shares[labels == group].max(axis=0).sum()
                without = _without_each(shares, labels)
                swapped = True
    return float(held.sum()), labels


def _without_each(shares: Floats, labels: Ints) -> Floats:
    """For each head and length, what its group would hold without it."""
    found = np.zeros_like(shares)
    for group in range(int(labels.max()) + 1):
        mine = np.flatnonzero(labels == group)
        if len(mine) == 1:
            continue
        part = shares[mine]
        second, first = np.sort(part, axis=0)[-2:]
        found[mine] = np.where(part == first, second, first)
        ties = (part == first).sum(axis=0) > 1
        found[mine] = np.where(ties, first, found[mine])
    return found
