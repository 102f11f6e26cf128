"""What a plan says of one KV head: its span rule, and in how many bits it stores keys and values."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from moa_search.formats.tiers import PLAIN, PLAIN_BITS, Tier
from moa_search.spans import BETA_ONE, DENSE, SpanRule

Bits = Literal[16, 8, 4, 3, 2]


class Strict(BaseModel):
    """A part of a plan: unknown keys and numbers that aren't finite are refused, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Stored(Strict):
    """How precisely a head's keys and values are stored, the sink's tokens aside; 16 bits are the model's own type."""

    key_bits: Bits = Field(default=PLAIN_BITS, description="bits of a number of a key")
    value_bits: Bits = Field(default=PLAIN_BITS, description="bits of a number of a value")

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if (name, value) not in _PLAIN_ENTRIES}

    @property
    def tier(self) -> Tier:
        """Bits of keys and of values."""
        return self.key_bits, self.value_bits


_PLAIN_ENTRIES = (("key_bits", PLAIN_BITS), ("value_bits", PLAIN_BITS))


class SpanPattern(_Stored):
    """``span(n) = alpha + floor(beta_256 / 256 * n)``, clamped as in `moa_search.spans`."""

    kind: Literal["span"] = "span"
    alpha: int = Field(ge=-(2**31), lt=2**31, description="constant part in tokens, may be negative")
    beta_256: int = Field(ge=0, le=BETA_ONE, description="growth per context token in 1/256")

    @property
    def rule(self) -> SpanRule:
        """The rule that this pattern stands for."""
        return SpanRule(self.alpha, self.beta_256)


class DensePattern(_Stored):
    """Every key is kept."""

    kind: Literal["dense"] = "dense"

    @property
    def rule(self) -> SpanRule:
        """The rule that this pattern stands for."""
        return DENSE


class NativePattern(Strict):
    """The layer's own sliding window (``sliding_window`` in the model's configuration) is kept, and no rule applies."""

    kind: Literal["native"] = "native"

    @property
    def rule(self) -> SpanRule:
        """Dense: nothing is dropped beyond what the model's own window hides."""
        return DENSE

    @property
    def tier(self) -> Tier:
        """16 bits."""
        return PLAIN


Pattern = Annotated[SpanPattern | DensePattern | NativePattern, Field(discriminator="kind")]


def pattern_of(rule: SpanRule, tier: Tier) -> Pattern:
    """The pattern of a rule and the bits of keys and of values."""
    bits: dict[str, Any] = dict(zip(("key_bits", "value_bits"), tier, strict=True))
    return DensePattern(**bits) if rule.is_dense else SpanPattern(alpha=rule.alpha, beta_256=rule.beta_256, **bits)
