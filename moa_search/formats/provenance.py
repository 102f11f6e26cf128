"""Where a plan comes from and what it costs: budgets, the search that found it, predicted and validated losses."""

from __future__ import annotations

from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from moa_search.formats.patterns import Strict


class Budget(Strict):
    """An upper bound that the plan keeps at one length: on its density, its bytes, or on a time in milliseconds."""

    length: int = Field(ge=1, description="tokens")
    density: float | None = Field(default=None, gt=0, le=1, description="share of the KV cache; None for a time")
    share: float | None = Field(default=None, gt=0, le=1, description="share of the bytes of a 16-bit cache")
    asked: str | None = Field(default=None, description="what the user wrote, where that wasn't a density")
    hardware: str | None = Field(default=None, description="whose cost model a time was computed with")

    @model_validator(mode="after")
    def _bounds_something(self) -> Budget:
        if self.density is None and self.share is None and self.asked is None:
            raise ValueError("neither density nor share nor asked says what is bounded")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class Provenance(Strict):
    """How a plan came about: enough to make it again."""

    searcher: str
    profile: str | None = Field(default=None, description="checksum of the profile file")
    criterion: str | None = None
    budgets: tuple[Budget, ...] = ()
    length_weights: dict[str, float] = Field(default_factory=dict, description="weight of each length's loss")
    objective: float | None = Field(default=None, description="weighted loss of this plan")
    dual_bound: float | None = Field(default=None, description="proven lower bound of the weighted loss")
    gap: float | None = Field(default=None, description="(objective - dual bound) / objective")
    versions: dict[str, str] = Field(default_factory=dict)
    knobs: dict[str, float | str] = Field(default_factory=dict, description="setting of the outer loop that found it")
    notes: tuple[str, ...] = Field(default=(), description="what an import from another format changed and cost")

    @property
    def how(self) -> str:
        """What found the plan, in words; a plan from another format says which one."""
        if self.searcher.startswith("imported "):
            return f"imported from {self.searcher.removeprefix('imported ')}"
        return f"{self.searcher} search" + (f" on {self.criterion}" if self.criterion else "")

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name not in ("knobs", "notes") or value}


class Validation(Strict):
    """What a plan loses on samples that neither profile nor search have seen."""

    length: int = Field(ge=1, description="tokens per sample")
    data: str = Field(description="hash of the samples")
    samples: int = Field(ge=1)
    loss: float = Field(description="mean loss under the plan, in nats per answer token")
    loss_error: float | None = Field(
        default=None, ge=0, description="its standard error over samples; None where there are too few to tell"
    )
    dense_loss: float | None = Field(default=None, description="mean loss of the same samples without a plan")


class LengthMetrics(Strict):
    """What a plan costs at one length."""

    length: int = Field(ge=1, description="tokens")
    density: float = Field(description="share of the dense KV cache's tokens kept, native layers aside")
    share: float | None = Field(default=None, description="share of the dense 16-bit cache's bytes kept, likewise")
    attention_density: float = Field(description="share of causal pairs computed in a prefill, native layers aside")
    loss: float | None = Field(default=None, description="predicted loss, in the criterion's unit")
    loss_error: float | None = Field(default=None, description="standard error of that loss")
    extrapolated: bool = Field(default=False, description="extrapolated from the losses at other lengths")

    @property
    def bytes_kept(self) -> float:
        """Share of the dense 16-bit cache's bytes kept, native layers aside; of tokens if all store 16 bits."""
        return self.density if self.share is None else self.share
