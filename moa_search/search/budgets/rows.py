"""Budgets in the user's units, each as one exact integer row over the rules of all heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.formats.profile_content import ProfileHeader
from moa_search.formats.provenance import Budget
from moa_search.formats.signature import own_window
from moa_search.formats.tiers import PLAIN, Tier, head_bytes
from moa_search.search.budgets.cost_model import CostModel
from moa_search.search.budgets.hardware import HARDWARE, Hardware
from moa_search.search.budgets.specs import BYTE_KINDS, TOKEN_KINDS, BudgetSpec
from moa_search.spans import SpanRule, span


@dataclass(frozen=True)
class BudgetRow:
    """One constraint: the promise to the user holds exactly where ``costs[choice].sum() <= limit``.

    Attributes:
        budget: What a plan remembers of it.
        costs: Cost of each option in one KV head, ``[option]``: tokens, bytes or picoseconds. An option is a rule under
            a tier, tiers outermost.
        limit: What all searchable heads may cost together; no more than they can.
        spec: What the user asked for.
        fixed: Part of the amount that no rule changes (weights, native layers), in the unit of ``spec.amount``.
        step: One unit of cost in the unit of ``spec.amount``.
    """

    budget: Budget
    costs: npt.NDArray[np.int64]
    limit: int
    spec: BudgetSpec
    fixed: Fraction
    step: Fraction


def budget_rows(
    specs: Sequence[str | BudgetSpec],
    rules: Sequence[SpanRule],
    header: ProfileHeader,
    *,
    tiers: Sequence[Tier] = (PLAIN,),
    anchor: Literal["position", "prompt"] = "position",
    hardware: Hardware | None = None,
    weights_bytes: int | None = None,
    bytes_per_element: int = 2,
) -> list[BudgetRow]:
    """The rows of a search under ``specs``, in their order.

    Args:
        specs: Budgets, as text or parsed.
        rules: The rules to choose from.
        header: Of the profile: shapes, sink and block, native layers.
        tiers: Bits of keys and of values to choose from.
        anchor: Where the plan evaluates its rules; decides what a prefill costs.
        hardware: For ``decode`` and ``prefill``.
        weights_bytes: Size of the model's weights, for ``memory``, ``decode`` and ``prefill``.
        bytes_per_element: Of keys and values.

    Raises:
        ConfigError: A text can't be read, a budget stands twice, or hardware or weights aren't given.
        BudgetInfeasibleError: The smallest spans break a budget; the message names it and the least that would do.
    """
    measures = _Measures(rules, header, tuple(tiers), anchor, hardware, weights_bytes, bytes_per_element)
    seen: dict[tuple[str, int, int], str] = {}
    rows = []
    for spec in map(_parsed, specs):
        what = (spec.kind, spec.length, spec.batch)
        if what in seen:
            raise ConfigError(f"budget '{spec.text}' repeats '{seen[what]}'; keep one of them")
        seen[what] = spec.text
        rows.append(measures.row(spec))
    return rows


def used(row: BudgetRow, choice: npt.NDArray[np.int64]) -> str:
    """What giving head h the option ``choice[h]`` uses of a budget, in the user's unit.

    Rounded down, since ``2.001GiB`` beside ``2GiB`` would look like a broken promise when it's only a rounding.
    """
    return row.spec.show(row.fixed + row.step * int(row.costs[choice].sum()), up=False)


@dataclass(frozen=True)
class _Measure:
    """Costs of each option, and how they make up an amount: ``fixed + step * sum of costs``."""

    costs: list[int]
    fixed: Fraction
    step: Fraction


@dataclass(frozen=True)
class _Measures:
    """What every row of one search shares."""

    rules: Sequence[SpanRule]
    header: ProfileHeader
    tiers: tuple[Tier, ...]
    anchor: Literal["position", "prompt"]
    hardware: Hardware | None
    weights_bytes: int | None
    bytes_per_element: int

    @property
    def heads(self) -> int:
        """KV heads that a search chooses rules for."""
        return len(self.header.searchable_layers) * self.header.model.num_key_value_heads

    @property
    def native_heads(self) -> int:
        """KV heads of native layers, whose cost no choice changes."""
        return len(self.header.native_layers) * self.header.model.num_key_value_heads

    def row(self, spec: BudgetSpec) -> BudgetRow:
        """The constraint, checked for a choice that meets it."""
        measure, heads = self.measure(spec), self.heads
        most = heads * max(measure.costs)
        if most >= 2**62:
            raise ConfigError(f"budget '{spec.text}': {heads} KV heads cost more there than 64 bits can count")
        limit = math.floor((spec.amount - measure.fixed) / measure.step)
        if limit < heads * min(measure.costs):
            least = spec.show(self.least(measure), up=True)
            fixed = f" ({spec.show(measure.fixed, up=False)} whatever the plan)" if measure.fixed else ""
            smallest = "the smallest spans" + ("" if self.tiers == (PLAIN,) else " in the fewest bits")
            raise BudgetInfeasibleError(f"{spec.text} can't be met: {smallest} already take {least}{fixed}")
        costs = np.array(measure.costs, dtype=np.int64)
        return BudgetRow(self._budget(spec, limit), costs, min(limit, most), spec, measure.fixed, measure.step)

    def least(self, measure: _Measure) -> Fraction:
        """Amount that the cheapest rule in every head takes."""
        return measure.fixed + measure.step * self.heads * min(measure.costs)

    def measure(self, spec: BudgetSpec) -> _Measure:
        """How rules make up an amount of the kind that is asked for."""
        if spec.kind in ("decode", "prefill"):
            return self._time(spec)
        header = self.header
        spans = [span(spec.length, rule, header.sink + header.block) for rule in self.rules]
        if spec.kind in TOKEN_KINDS:
            whole = self.heads * (spec.length if spec.kind == "density" else 1)
            return _Measure(spans * len(self.tiers), Fraction(0), Fraction(1, whole))
        token = 2 * header.model.head_dim * self.bytes_per_element  # of one head, in 16 bits
        if self.tiers == (PLAIN,):
            costs, step = spans, Fraction(token)
        else:
            size = partial(
                head_bytes, width=header.model.head_dim, sink=header.sink, plain_bytes=self.bytes_per_element
            )
            costs, step = [size(tokens, tier) for tier in self.tiers for tokens in spans], Fraction(1)
        if spec.kind == "share":
            return _Measure(costs, Fraction(0), step / (token * self.heads * spec.length))
        weights = self._weights(spec) if spec.kind == "memory" else 0
        native = token * spec.batch * self.native_heads * self._native_span(spec.length)
        return _Measure(costs, Fraction(weights + native), step * spec.batch)

    def _time(self, spec: BudgetSpec) -> _Measure:
        if self.tiers != (PLAIN,):
            raise ConfigError(
                f"budget '{spec.text}': times are modelled for 16 bits only; give tiers: 16, or a budget in bytes"
            )
        if self.hardware is None:
            raise ConfigError(
                f"budget '{spec.text}' needs the speeds of a device; give hardware: one of {', '.join(HARDWARE)}, "
                "or a .yaml file made by moa-search hardware"
            )
        model = CostModel(self.hardware, self.header.model, self.bytes_per_element)
        sink, min_span = self.header.sink, self.header.sink + self.header.block
        length, batch = spec.length, spec.batch
        if spec.kind == "decode":
            costs = [model.decode_ps(span(length, rule, min_span), batch=batch) for rule in self.rules]
            native = model.decode_ps(self._native_span(length), batch=batch)
            tokens = batch
        else:
            rules = self.rules
            if self.anchor == "prompt":
                rules = [SpanRule(span(length, rule, min_span), 0) for rule in rules]
            costs = [model.prefill_ps(rule, length, sink=sink, min_span=min_span, batch=batch) for rule in rules]
            window = SpanRule(self._native_span(length), 0)
            native = model.prefill_ps(window, length, sink=0, min_span=1, batch=batch)  # of no head without a window
            tokens = length * batch
        fixed = model.weights_ps(self._weights(spec), tokens) + self.native_heads * native
        return _Measure(costs, fixed, Fraction(1))

    def _native_span(self, length: int) -> int:
        """Tokens that a head of a native layer keeps; 0 without such layers."""
        return min(length, own_window(self.header.model) or 0) if self.header.native_layers else 0

    def _weights(self, spec: BudgetSpec) -> int:
        if self.weights_bytes is None:
            raise ConfigError(
                f"budget '{spec.text}' needs the size of the model's weights, which the profile doesn't tell; "
                "give weights_bytes"
            )
        return self.weights_bytes

    def _budget(self, spec: BudgetSpec, limit: int) -> Budget:
        if spec.kind in ("decode", "prefill"):
            assert self.hardware is not None
            return Budget(length=spec.length, asked=spec.text, hardware=self.hardware.name)
        if spec.kind == "density":
            return Budget(length=spec.length, density=float(spec.amount))
        if spec.kind == "share":
            return Budget(length=spec.length, share=float(spec.amount))
        if spec.kind in BYTE_KINDS and self.tiers != (PLAIN,):
            whole = 2 * self.header.model.head_dim * self.bytes_per_element * self.heads * spec.length
            return Budget(length=spec.length, share=min(1.0, limit / whole), asked=spec.text)
        return Budget(length=spec.length, density=min(1.0, limit / (self.heads * spec.length)), asked=spec.text)


def _parsed(spec: str | BudgetSpec) -> BudgetSpec:
    return BudgetSpec.parse(spec) if isinstance(spec, str) else spec
