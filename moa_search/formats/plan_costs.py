"""What a plan keeps, stores and computes at a length."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Self

from moa_search import spans
from moa_search.errors import ConfigError
from moa_search.formats.patterns import pattern_of
from moa_search.formats.plan_content import PlanContent
from moa_search.formats.provenance import LengthMetrics
from moa_search.formats.tiers import PLAIN_BITS, head_bytes, token_bytes
from moa_search.spans import SpanRule


class PlanCosts(PlanContent):
    """Spans, densities and bytes of a plan at a context of so many tokens, and the plan that has them for good.

    All methods raise `ConfigError` for a length that is no whole number of at least 1.
    """

    def spans(self, length: int) -> list[list[int]]:
        """Keys kept per ``[layer][kv_head]`` at a context of ``length`` tokens; of native layers, their own window."""
        _require_length(length)
        native, window = self.native_layers, self.native_window
        return [
            [
                min(length, window) if window and layer in native else spans.span(length, rule, self.min_span)
                for rule in heads
            ]
            for layer, heads in enumerate(self.rules)
        ]

    def density(self, length: int) -> float:
        """Share of the dense KV cache that is kept at ``length`` tokens, over all heads but those of native layers."""
        _require_length(length)
        return spans.density(self._searchable_rules(), length, self.min_span)

    def attention_density(self, length: int) -> float:
        """Share of causal query-key pairs computed in a prefill of ``length`` tokens, over the heads of `density`."""
        return self.attention_densities([length])[0]

    def attention_densities(self, lengths: Sequence[int]) -> list[float]:
        """`attention_density` at several lengths, in the time of the longest one (unless anchored at the prompt)."""
        if self.anchor == "prompt":
            return [self.resolve(length).attention_density(length) for length in lengths]
        for length in lengths:
            _require_length(length)
        return spans.attention_densities(self._searchable_rules(), lengths, self.min_span)

    def kv_bytes(self, length: int, *, batch: int = 1, bytes_per_element: int = 2) -> int:
        """Bytes of keys and values kept at ``length`` tokens, native layers' too, cache granularity aside.

        Args:
            length: Tokens.
            batch: Samples.
            bytes_per_element: Of numbers stored in 16 bits, i.e. in the model's own type.
        """
        return batch * sum(self.bytes_by_layer(length, bytes_per_element=bytes_per_element))

    def share(self, length: int) -> float:
        """Share of a dense 16-bit cache's bytes that is kept at ``length`` tokens, native layers aside."""
        layers = [layer for layer in range(len(self.patterns)) if layer not in self.native_layers]
        kept = self.bytes_by_layer(length)
        dense = 2 * token_bytes(PLAIN_BITS, self.model.head_dim) * length * self.model.num_key_value_heads
        return sum(kept[layer] for layer in layers) / (dense * len(layers))

    def bytes_by_layer(self, length: int, *, bytes_per_element: int = 2) -> list[int]:
        """`kv_bytes` of one sample, layer by layer."""
        width, native = self.model.head_dim, self.native_layers
        return [
            sum(
                head_bytes(tokens, tier, width, sink=0 if layer in native else self.sink, plain_bytes=bytes_per_element)
                for tokens, tier in zip(spans_of_layer, tiers_of_layer, strict=True)
            )
            for layer, (spans_of_layer, tiers_of_layer) in enumerate(zip(self.spans(length), self.tiers, strict=True))
        ]

    def metrics(self, length: int) -> LengthMetrics:
        """Densities and, where some head stores fewer than 16 bits, the share of bytes at ``length`` tokens."""
        return LengthMetrics(
            length=length,
            density=self.density(length),
            share=None if self.is_plain else self.share(length),
            attention_density=self.attention_density(length),
        )

    def anchored_at(self, length: int) -> Self:
        """The same plan with every rule fixed at its span for ``length`` tokens, anchored at positions."""
        patterns = tuple(
            tuple(
                pattern if pattern.kind == "native" else pattern_of(SpanRule(tokens, 0), pattern.tier)
                for pattern, tokens in zip(*layer, strict=True)
            )
            for layer in zip(self.patterns, self.spans(length), strict=True)
        )
        return self.model_copy(update={"anchor": "position", "patterns": patterns, "predicted": (), "validated": ()})

    def resolve(self, length: int) -> Self:
        """The plan for prompts of ``length`` tokens: one that is anchored at the prompt has constant spans there."""
        return self.anchored_at(length) if self.anchor == "prompt" else self

    def _searchable_rules(self) -> list[SpanRule]:
        native = self.native_layers
        return [rule for layer, heads in enumerate(self.rules) if layer not in native for rule in heads]


def _require_length(length: int) -> None:
    if not isinstance(length, Integral):
        raise ConfigError(f"length: {length!r} is no whole number of tokens")
    if length < 1:
        raise ConfigError(f"length: {length} is out of range; it must be at least 1")
