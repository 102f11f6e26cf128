"""How long a KV head takes on a device under a rule: a roofline over whole tiles, in integer picoseconds.

A piece of work takes the longer of moving its bytes and doing its FLOPs, as in the memory-aware cost of Kinetics
(arXiv 2506.05333); work is counted in the tiles that a kernel touches, masked pairs included, as NATTEN's simulator
does (arXiv 2504.16922), so a window that ends just inside a tile pays for all of it. ``docs/budgets.md`` says what is
left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from moa_search.formats.signature import ModelSignature
from moa_search.search.budgets.hardware import Hardware
from moa_search.spans import SpanRule, span

PICOSECONDS = 10**12
"""In a second. Whole picoseconds let a sum of times be compared with a limit without rounding."""

MATMULS_OF_ATTENTION = 2
"""Queries with keys, and weights with values; each takes 2 FLOPs per pair and element of a head."""


@dataclass(frozen=True)
class CostModel:
    """Times of one model on one device.

    Attributes:
        hardware: The device.
        model: Shapes of the model.
        bytes_per_element: Of keys and values.
    """

    hardware: Hardware
    model: ModelSignature
    bytes_per_element: int = 2

    def decode_ps(self, tokens: int, *, batch: int = 1) -> int:
        """Attention of one decoding step in one KV head of all samples, in picoseconds, rounded up.

        Keys and values are read once for all query heads of the group.

        Args:
            tokens: Keys kept per sample, rounded up to whole tiles here.
            batch: Samples decoded together.
        """
        tile = self.hardware.tile_key
        pairs = -(-tokens // tile) * tile * batch
        moved = 2 * pairs * self.model.head_dim * self.bytes_per_element
        return math.ceil(self._seconds(moved, self._attention_flops(pairs)) * PICOSECONDS)

    def prefill_ps(self, rule: SpanRule, length: int, *, sink: int, min_span: int, batch: int = 1) -> int:
        """Attention of a prefill of ``length`` tokens in one KV head of all samples, in picoseconds, rounded up.

        Args:
            rule: The head's rule, evaluated at every query's own position.
            length: Tokens per sample.
            sink: Tokens always attended.
            min_span: Smallest span in tokens.
            batch: Samples processed together.
        """
        query, key = self.hardware.tile_query, self.hardware.tile_key
        tiles = touched_tiles(rule, length, sink=sink, min_span=min_span, tile_query=query, tile_key=key)
        return math.ceil(self._seconds(0, self._attention_flops(tiles * query * key * batch)) * PICOSECONDS)

    def weights_ps(self, weights_bytes: int, tokens: int) -> Fraction:
        """Everything that multiplies ``tokens`` tokens with the weights, in picoseconds, exactly.

        Every 16-bit weight is read once and multiplied with each token.

        Args:
            weights_bytes: Size of all weights.
            tokens: Tokens of the pass, over all samples: the batch in a decoding step.
        """
        return self._seconds(weights_bytes, 2 * (weights_bytes // 2) * tokens) * PICOSECONDS

    def _attention_flops(self, pairs: int) -> int:
        """Of query-key pairs that each query head of a group computes."""
        return MATMULS_OF_ATTENTION * 2 * pairs * self.model.head_dim * self.model.group

    def _seconds(self, moved_bytes: int, flops: int) -> Fraction:
        device = self.hardware
        return max(moved_bytes / Fraction(device.bandwidth_bytes_per_s), flops / Fraction(device.flops_per_s))


def touched_tiles(rule: SpanRule, length: int, *, sink: int, min_span: int, tile_query: int, tile_key: int) -> int:
    """Tiles of ``tile_query`` queries by ``tile_key`` keys in which some pair is attended in a prefill.

    Between the first and the last row of a tile, a window's start never moves back and its end is the row itself, so
    the keys that the tile sees outside the sink are one interval.

    Args:
        rule: The head's rule, evaluated at every query's own position.
        length: Tokens.
        sink: Tokens always attended.
        min_span: Smallest span in tokens, larger than ``sink``.
        tile_query: Queries per tile; the last tile may be cut.
        tile_key: Keys per tile; the last tile may be cut.
    """
    first = np.arange(0, length, tile_query, dtype=np.int64)
    last = np.minimum(first + tile_query, length) - 1
    start = first + 1 - (span(first + 1, rule, min_span) - sink)
    window_from, window_to = start // tile_key, last // tile_key + 1
    window_to = np.where(start <= last, window_to, window_from)
    sink_to = -(-np.minimum(sink, last + 1) // tile_key)
    shared = np.maximum(0, np.minimum(sink_to, window_to) - window_from)
    return int((window_to - window_from + sink_to - shared).sum())
