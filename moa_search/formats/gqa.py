"""From one rule per query head to one per KV head: the least that keeps every key that some query head kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from moa_search.spans import BETA_ONE, SpanRule, span


def to_kv_heads(
    rules: Sequence[Sequence[SpanRule]], group: int, min_span: int, lengths: Sequence[int] = ()
) -> list[list[SpanRule]]:
    """Rules ``[layer][kv_head]`` from rules ``[layer][query head]``, of which ``group`` consecutive ones share keys.

    Args:
        rules: One rule per layer and query head.
        group: Query heads per KV head.
        min_span: Smallest span in tokens.
        lengths: As for `merge_rules`.
    """
    known: dict[frozenset[SpanRule], SpanRule] = {}
    merged = []
    for layer in rules:
        heads = []
        for first in range(0, len(layer), group):
            members = frozenset(layer[first : first + group])
            if members not in known:
                known[members] = merge_rules(members, min_span, lengths)
            heads.append(known[members])
        merged.append(heads)
    return merged


def merge_rules(rules: frozenset[SpanRule], min_span: int, lengths: Sequence[int] = ()) -> SpanRule:
    """A rule whose span is at least that of every one of ``rules``.

    If one of them has both the largest alpha and the largest beta, it is the answer. Otherwise the rules cross.
    Without ``lengths``, the largest alpha together with the largest beta is taken, which is enough at every
    length. With them, only the contexts from the shortest to the longest count, and of the rules themselves,
    that pair, and the chord of their maximum, the one that keeps the fewest keys there is taken.

    Args:
        rules: At least one rule.
        min_span: Smallest span in tokens.
        lengths: Contexts in tokens between which the answer has to be enough; everywhere, if there are none.

    Returns:
        The rule, enough wherever it has to be.
    """
    everywhere = envelope(rules)
    if everywhere in rules or not lengths:
        return everywhere
    n = np.arange(min(lengths), max(lengths) + 1, dtype=np.int64)
    needed = np.max([span(n, rule, min_span) for rule in rules], axis=0)
    candidates = [*sorted(rules), everywhere, *_chords(n, needed)]
    spans = {rule: span(n, rule, min_span) for rule in candidates}
    return min((rule for rule in spans if (spans[rule] >= needed).all()), key=lambda rule: int(spans[rule].sum()))


def envelope(rules: Collection[SpanRule]) -> SpanRule:
    """The largest alpha together with the largest beta: enough at every length; one of ``rules`` unless they cross."""
    return SpanRule(max(rule.alpha for rule in rules), max(rule.beta_256 for rule in rules))


def _chords(n: np.ndarray, needed: np.ndarray) -> list[SpanRule]:
    """The two rules nearest to the line through both ends of ``needed``, raised until they are enough."""
    slope = BETA_ONE * (int(needed[-1]) - int(needed[0])) / max(len(n) - 1, 1)
    chords = []
    for beta_256 in {int(slope), min(int(slope) + 1, BETA_ONE)}:
        alpha = int((needed - ((beta_256 * n) >> 8)).max())
        chords.append(SpanRule(alpha, beta_256))
    return chords
