"""Span rules: how many keys a query attends, as a function of its context length.

``span(n) = min(n, max(min_span, alpha + floor(beta * n)))`` with ``beta = beta_256 / 256``. The sink tokens
count inside the span. This module holds the only implementation of that formula (MoA, arXiv 2406.14909,
eq. 3, evaluated at each query's own position); kernels and caches receive its integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moa_search.errors import ConfigError

MAX_LENGTH = 2**27
"""Longest context in tokens that is taken for meant."""

SINK_TOKENS = 16
"""First tokens of a sequence that every head keeps, unless told otherwise.

A plan file that names no sink or block means these numbers: changing them takes a new plan schema."""

BLOCK_TOKENS = 32
"""Smallest window, and the granularity of small windows and of cache growth, unless told otherwise."""

BETA_ONE = 256
"""``beta_256`` of beta = 1. Multiples of 1/256 give every device the same integer."""

SLICE = 2**20
"""Positions that are added up at a time."""

IntsT = TypeVar("IntsT")
"""An ``int``, an int64 NumPy array or an int64 torch tensor."""


@dataclass(frozen=True, order=True)
class SpanRule:
    """One head's rule.

    Attributes:
        alpha: Constant part in tokens; may be negative.
        beta_256: Growth per context token in 1/256, ``0 <= beta_256 <= 256``.
    """

    alpha: int
    beta_256: int

    def __post_init__(self) -> None:
        if not 0 <= self.beta_256 <= BETA_ONE:
            raise ConfigError(f"beta_256 is {self.beta_256}; it must lie in 0..{BETA_ONE}")
        if not -(2**31) <= self.alpha < 2**31:
            raise ConfigError(f"alpha is {self.alpha} tokens; it must fit 32 bits")

    @property
    def beta(self) -> float:
        """Growth per context token."""
        return self.beta_256 / BETA_ONE

    @property
    def is_dense(self) -> bool:
        """Whether every query attends everything before it, whatever the length."""
        return self.beta_256 == BETA_ONE and self.alpha >= 0

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        share = "" if self.beta_256 == BETA_ONE else f"{self.beta:.8g}"
        growth = f"{share}n" if self.beta_256 else ""
        if not growth or not self.alpha:
            return growth or f"{self.alpha}"
        return f"{growth}{self.alpha:+d}"


DENSE = SpanRule(alpha=0, beta_256=BETA_ONE)
"""The rule that keeps everything."""


def span(n: IntsT, rule: SpanRule, min_span: int) -> IntsT:
    """Keys attended by a query whose context, itself included, is ``n`` tokens.

    Args:
        n: Context lengths in tokens: an int64 NumPy array or torch tensor of any shape, or an ``int``.
        rule: The head's rule.
        min_span: Lower bound in tokens (sink plus one block).

    Returns:
        Spans in tokens, of the type and shape of ``n``.
    """
    context: Any = np.int64(n) if isinstance(n, int) else n
    wanted = (rule.alpha + ((rule.beta_256 * context) >> 8)).clip(min_span)
    kept: Any = context - (context - wanted).clip(0)
    return int(kept) if isinstance(n, int) else kept  # type: ignore[return-value]


def density(rules: Iterable[SpanRule], length: int, min_span: int) -> float:
    """Mean over heads of ``span(length) / length``: the share of the dense KV cache that is kept."""
    spans = [span(length, rule, min_span) for rule in rules]
    return sum(spans) / (len(spans) * length)


def attention_density(rules: Iterable[SpanRule], length: int, min_span: int) -> float:
    """Mean over heads of the share of causal query-key pairs computed in a prefill of ``length`` tokens."""
    return attention_densities(rules, [length], min_span)[0]


def attention_densities(rules: Iterable[SpanRule], lengths: Sequence[int], min_span: int) -> list[float]:
    """`attention_density` at several lengths, in the time that the longest takes."""
    counts: dict[SpanRule, int] = {}
    for rule in rules:
        counts[rule] = counts.get(rule, 0) + 1
    heads, kept, first, found = sum(counts.values()), 0, 1, {}
    for length in sorted(set(lengths)):
        for start in range(first, length + 1, SLICE):  # millions of positions at once would take gigabytes
            n = np.arange(start, min(start + SLICE, length + 1), dtype=np.int64)
            kept += sum(int(span(n, rule, min_span).sum()) * count for rule, count in counts.items())
        first = length + 1
        found[length] = kept / (heads * (length * (length + 1) // 2))
    return [found[length] for length in lengths]
