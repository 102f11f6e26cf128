"""The rules that a search chooses from, fitted to the lengths in play."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moa_search.spans import DENSE, SpanRule, span

BETAS_256 = (0, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
CONSTANT_BLOCKS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
PER_OCTAVE = 4

POSITIONS = 2**17
"""Positions at which rules are compared; of more, as many evenly spread ones."""


def rule_grid(lengths: Sequence[int], *, sink: int, block: int) -> list[SpanRule]:
    """Rules ``alpha + beta n`` that differ somewhere up to the longest of ``lengths``.

    alpha runs over every block or two near zero, then four values per octave up to the longest length, and
    over a few negative values (heads that look far only in long contexts); beta over multiples of 1/32 and
    coarser. Of rules that agree at every position, the one that grows least is kept, but dense
    comes first: a head that needs all that it was shown is taken to need all beyond, too.

    Args:
        lengths: Profiled and budgeted lengths in tokens.
        sink: Tokens always kept.
        block: Tokens that the smallest span adds to the sink.

    Returns:
        Rules in ascending order; the smallest span and dense are always among them.
    """
    longest, smallest = max(lengths), sink + block
    blocks = set(CONSTANT_BLOCKS)
    size = CONSTANT_BLOCKS[-1]
    while size * block < longest:
        octave = [round(size * 2 ** (step / PER_OCTAVE)) for step in range(1, PER_OCTAVE + 1)]
        blocks.update(octave)
        size = octave[-1]
    constants = sorted(b * block for b in blocks if b * block < longest)
    negatives = [-block * 2**k for k in range(1, 32) if block * 2**k <= longest // 2]
    candidates = {SpanRule(a, b) for b in BETAS_256 for a in (*constants, *negatives) if b or a > smallest}
    candidates |= {DENSE, SpanRule(smallest, 0)}
    n = np.unique(np.linspace(1, longest, min(longest, POSITIONS)).astype(np.int64))
    distinct: dict[bytes, SpanRule] = {}  # by a digest of the spans: the spans themselves would take gigabytes
    for rule in sorted(candidates, key=lambda r: (r.is_dense, -r.beta_256, -abs(r.alpha))):
        distinct[hashlib.sha256(span(n, rule, smallest).tobytes()).digest()] = rule
    return sorted(distinct.values())
