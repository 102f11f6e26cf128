"""The candidate windows that one pass measures."""

from __future__ import annotations

from moa_search.spans import BLOCK_TOKENS

ROW_BUCKETS = 32
"""Equal slices of the rows; a rule's window is looked up once per slice."""

FINE_BLOCKS = 16
PER_OCTAVE = 6


def window_grid(length: int, block: int = BLOCK_TOKENS) -> tuple[int, ...]:
    """Windows in tokens: every block up to 16 blocks, then 6 per octave, ending at ``length``.

    All but the last are whole blocks, so that a pass sums up blocks rather than tokens.

    Args:
        length: Tokens of the sample.
        block: Tokens per block.
    """
    fine = [block * i for i in range(1, FINE_BLOCKS + 1)]
    coarse: list[int] = []
    while not coarse or coarse[-1] < length:
        octaves = (len(coarse) + 1) / PER_OCTAVE
        coarse.append(block * round(FINE_BLOCKS * 2**octaves))
    return (*(w for w in (*fine, *coarse) if w < length), length)
