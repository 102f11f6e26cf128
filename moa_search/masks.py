"""Span rules as boolean masks: the reference that tests and plots compare with, quadratic in length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moa_search.spans import SpanRule, span

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


def span_mask(
    rule: SpanRule, length: int, *, sink: int, min_span: int, most_points: int | None = None
) -> npt.NDArray[np.bool_]:
    """Which key each query attends under one rule.

    A query at 0-based position i attends key j iff ``j <= i`` and (``j < sink`` or
    ``j > i - window(i + 1)``), where ``window(n) = span(n) - sink``.

    Args:
        rule: The head's rule.
        length: Tokens.
        sink: First tokens that are always attended.
        min_span: Lower bound of spans in tokens.
        most_points: Look at so many positions at most, equally far apart; for pictures of long contexts.

    Returns:
        ``[query, key]``, True where attended.
    """
    points = length if most_points is None else min(length, most_points)
    at = np.arange(points, dtype=np.int64) * length // points
    i, j = at[:, None], at[None, :]
    window = span(i + 1, rule, min_span) - sink
    return (j <= i) & ((j < sink) | (j > i - window))


def head_masks(
    rules: Sequence[SpanRule], group: int, length: int, *, sink: int, min_span: int
) -> npt.NDArray[np.bool_]:
    """Masks of one layer, each KV head's repeated for the ``group`` consecutive query heads that share it.

    Returns:
        ``[query head, query, key]``, True where attended.
    """
    masks = [span_mask(rule, length, sink=sink, min_span=min_span) for rule in rules]
    return np.repeat(np.stack(masks), group, axis=0)
