"""What a plan file says, and what has to hold of it."""

from __future__ import annotations

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from moa_search.formats.patterns import Pattern, Strict
from moa_search.formats.provenance import LengthMetrics, Provenance, Validation
from moa_search.formats.signature import ModelSignature, check_native_layers, own_window
from moa_search.formats.tiers import PLAIN, Tier, wants_transform
from moa_search.spans import BLOCK_TOKENS, SINK_TOKENS, SpanRule
from moa_search.version import __version__

PLAN_SCHEMAS: Final = ("moa-plan/1", "moa-plan/2")
"""Of plans whose heads all store 16 bits, and of others."""


class PlanContent(Strict):
    """A plan's fields, told in `Plan`, checked against one another and against the model."""

    schema_: Literal["moa-plan/1", "moa-plan/2"] = Field(default="moa-plan/1", alias="schema")
    library_version: str = __version__
    model: ModelSignature
    sink: int = Field(default=SINK_TOKENS, ge=0, le=2**20)
    block: int = Field(default=BLOCK_TOKENS, ge=1, le=2**20)
    anchor: Literal["position", "prompt"] = "position"
    patterns: tuple[tuple[Pattern, ...], ...]
    transforms: str | None = Field(default=None, pattern="^sha256:[0-9a-f]{64}$")
    provenance: Provenance | None = None
    predicted: tuple[LengthMetrics, ...] = ()
    validated: tuple[Validation, ...] = ()

    @model_validator(mode="after")
    def _shape_matches_model(self) -> Self:
        if len(self.patterns) != self.model.num_hidden_layers:
            raise ValueError(f"patterns of {len(self.patterns)} layers, the model has {self.model.num_hidden_layers}")
        for layer, heads in enumerate(self.patterns):
            if len(heads) != self.model.num_key_value_heads:
                raise ValueError(
                    f"layer {layer} has {len(heads)} patterns, the model has {self.model.num_key_value_heads} KV heads"
                )
        return self

    @model_validator(mode="after")
    def _native_layers_make_sense(self) -> Self:
        for layer, heads in enumerate(self.patterns):
            if len({pattern.kind == "native" for pattern in heads}) > 1:
                raise ValueError(f"layer {layer} is native in some KV heads only; a layer is native as a whole")
        check_native_layers(self.model, self.native_layers)
        return self

    @model_validator(mode="after")
    def _schema_says_whether_bits_differ(self) -> Self:
        tiers = {pattern.tier for heads in self.patterns for pattern in heads}
        if self.is_plain != (tiers == {PLAIN}):
            what = "in which every head stores" if self.is_plain else "with less than"
            raise ValueError(f"{self.schema_} is for plans {what} 16 bits")
        transformed = any(wants_transform(key_bits) for key_bits, _ in tiers)
        if transformed and self.transforms is None:
            raise ValueError("transforms is missing, which keys below 8 bits need")
        if self.transforms is not None and not transformed:
            raise ValueError("transforms is given, but no head's keys are stored below 8 bits")
        return self

    @property
    def rules(self) -> list[list[SpanRule]]:
        """Rules ``[layer][kv_head]``; dense in native layers, whose own window hides keys on top of that."""
        return [[pattern.rule for pattern in layer] for layer in self.patterns]

    @property
    def tiers(self) -> list[list[Tier]]:
        """Bits of keys and of values ``[layer][kv_head]``; 16 in native layers."""
        return [[pattern.tier for pattern in layer] for layer in self.patterns]

    @property
    def is_plain(self) -> bool:
        """Whether every head stores 16 bits."""
        return self.schema_ == PLAN_SCHEMAS[0]

    @property
    def native_layers(self) -> tuple[int, ...]:
        """Layers that keep their own sliding window, increasing."""
        return tuple(layer for layer, heads in enumerate(self.patterns) if heads[0].kind == "native")

    @property
    def native_window(self) -> int | None:
        """Tokens that a query of a native layer attends at most, itself included; None without such layers."""
        return own_window(self.model) if self.native_layers else None

    @property
    def min_span(self) -> int:
        """Smallest span in tokens."""
        return self.sink + self.block
