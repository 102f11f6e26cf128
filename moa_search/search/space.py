"""What a searcher chooses from: rules, budgets as integer rows, and the loss of every rule for every KV head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.formats.profile import Profile
from moa_search.formats.tiers import Tier
from moa_search.options import SearchOptions
from moa_search.search.budgets import BudgetRow, BudgetSpec, Hardware, budget_rows
from moa_search.search.losses import RuleLosses, rule_losses
from moa_search.search.solver import Problem
from moa_search.spans import SpanRule, span

Booleans = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SearchSpace:
    """A profile under a set of budgets, ready to be chosen from.

    Attributes:
        profile: Influence statistics.
        options: What the user asked for.
        rules: Candidate rules, ascending.
        tiers: Candidate bits of keys and of values. With R rules, option ``t * R + r`` is rule r under tier t.
        rows: Budgets.
        losses: One per profiled and predicted length, by length; they are what is reported.
        allowed: ``[head, option]``, or None for everything.
    """

    profile: Profile
    options: SearchOptions
    rules: list[SpanRule]
    tiers: list[Tier]
    rows: list[BudgetRow]
    losses: list[RuleLosses]
    allowed: Booleans | None

    @classmethod
    def build(
        cls, profile: Profile, options: SearchOptions, rules: list[SpanRule], tiers: list[Tier], criterion: str
    ) -> SearchSpace:
        """The space of choosing among ``rules`` and ``tiers`` by ``criterion``.

        Raises:
            ConfigError: An option can't be used.
            BudgetInfeasibleError: No choice keeps a budget; the message names it.
        """
        header = profile.header
        specs = [*density_specs(profile, options), *map(BudgetSpec.parse, options.budget)]
        if not specs:
            raise ConfigError("no budget is given; ask for a density, such as 0.25, or a budget, such as kv=2GiB@32k")
        rows = budget_rows(
            specs,
            rules,
            header,
            tiers=tiers,
            anchor=options.anchor,
            hardware=Hardware.of(options.hardware),
            weights_bytes=options.weights_bytes or header.weights_bytes,
        )
        losses = rule_losses(profile, rules, criterion, anchor=options.anchor, tiers=tiers)
        for length in sorted(set(options.predict_lengths or ()) - set(profile.lengths)):
            from moa_search.search.extrapolation import extrapolate

            losses.append(extrapolate(profile, rules, criterion, length, anchor=options.anchor, tiers=tiers))
        losses.sort(key=lambda loss: loss.length)
        allowed = _allowed(profile, options, rules, specs)
        if allowed is not None:
            allowed = np.tile(allowed, len(tiers))
        space = cls(profile, options, rules, tiers, rows, losses, allowed)
        space._require_feasible()
        return space

    def option(self, index: int) -> tuple[SpanRule, Tier]:
        """The rule and the bits that an option stands for."""
        tier, rule = divmod(index, len(self.rules))
        return self.rules[rule], self.tiers[tier]

    @property
    def heads_per_layer(self) -> int:
        """KV heads of one layer."""
        return self.profile.header.model.num_key_value_heads

    @cached_property
    def weights(self) -> dict[int, float]:
        """Weight of every length that counts, by length; they add up to 1.

        Raises:
            ConfigError: A weight is negative or of a length without losses, or all are 0.
        """
        given, known = self.options.length_weights, [loss.length for loss in self.losses]
        for length, weight in given.items():
            if length not in known:
                raise ConfigError(
                    f"length_weights: {length} is none of the lengths {', '.join(map(str, known))}; "
                    "name it in predict_lengths too, or profile it"
                )
            if not 0 <= weight < np.inf:
                raise ConfigError(f"length_weights: {weight:g} at {length} is out of range; it must be at least 0")
        if given and not sum(given.values()) > 0:
            raise ConfigError("length_weights: all are 0; give at least one length a weight")
        chosen = {length: given.get(length, 0.0) for length in known} if given else dict.fromkeys(known, 1.0)
        total = sum(chosen.values())
        return {length: weight / total for length, weight in chosen.items() if weight > 0}

    @property
    def objectives(self) -> list[Doubles]:
        """``[head, option]`` for each length in `weights`: what a searcher minimises."""
        by_length = {loss.length: loss for loss in self.losses}
        return [by_length[length].robust(self.options.robust) for length in self.weights]

    @cached_property
    def problem(self) -> Problem:
        """Costs, limits and what is allowed, with the first length's losses."""
        return Problem(
            self.objectives[0],
            np.stack([row.costs for row in self.rows]),
            np.array([row.limit for row in self.rows], dtype=np.int64),
            heads_per_layer=self.heads_per_layer,
            rules_per_layer=self.options.rules_per_layer,
            allowed=self.allowed,
        )

    def _require_feasible(self) -> None:
        """Each budget alone can be met under the floors; together they are left to the solver."""
        if self.allowed is None:
            return
        for row in self.rows:
            least = int(np.where(self.allowed, row.costs, np.iinfo(np.int64).max).min(1).sum())
            if least > row.limit:
                shown = row.spec.show(row.fixed + row.step * least, up=True)
                raise BudgetInfeasibleError(
                    f"{row.spec.text} can't be met: with the floors of min_span and layer_floor it takes {shown}"
                )


def density_specs(profile: Profile, options: SearchOptions) -> list[BudgetSpec]:
    """Budgets from one density, and one share of bytes, for all lengths, or one for each.

    Raises:
        ConfigError: One isn't in (0, 1], their number fits neither, or there are lengths for none.
    """
    if options.budget_lengths and not options.density and not options.kv_share:
        raise ConfigError("budget_lengths are where densities hold; give a density too, or leave them out")
    densities = _at_lengths(profile, options, options.density, "densities")
    shares = _at_lengths(profile, options, options.kv_share, "shares")
    return [*(BudgetSpec.density(*each) for each in densities), *(BudgetSpec.share(*each) for each in shares)]


def _at_lengths(profile: Profile, options: SearchOptions, parts: Sequence[float], name: str) -> list[tuple[float, int]]:
    """Each part of the cache with the length in tokens that it holds at."""
    each, lengths = list(parts), list(options.budget_lengths or profile.lengths)
    if not each:
        return []
    if len(each) not in (1, len(lengths)):
        raise ConfigError(f"{len(each)} {name} for {len(lengths)} lengths; give one, or one per length")
    each = each * (len(lengths) if len(each) == 1 else 1)
    if not options.budget_lengths:
        context = profile.header.model.context_length
        further = sorted(set(options.predict_lengths or ()) - set(lengths))
        further += [context] if context is not None and context > max(lengths + further) else []
        lengths += further
        each += [each[-1]] * len(further)
    return list(zip(each, lengths, strict=True))


def parse_floors(texts: Sequence[str], layers: int, native_layers: Sequence[int] = ()) -> dict[int, float]:
    """``LAYER=DENSITY`` or ``FIRST-LAST=DENSITY``, such as ``0-1=1.0``, as a density by layer.

    Of several floors of a layer the largest holds. Native layers within a range have none.

    Raises:
        ConfigError: A text isn't of that form, names a layer that there isn't, or names native layers alone.
    """
    floors: dict[int, float] = {}
    for text in texts:
        form = re.fullmatch(r"(\d+)(?:-(\d+))?=(\d*\.?\d+)", text.strip())
        if not form:
            raise ConfigError(f"layer_floor: {text!r} isn't of the form LAYER=DENSITY, such as 0=1.0 or 0-3=0.5")
        first, last, density = int(form[1]), int(form[2] or form[1]), float(form[3])
        if not first <= last < layers:
            raise ConfigError(f"layer_floor: {text!r} names layers outside 0..{layers - 1}")
        if not 0 < density <= 1:
            raise ConfigError(f"layer_floor: {text!r}: a density is over 0 and at most 1")
        named = [layer for layer in range(first, last + 1) if layer not in native_layers]
        if not named:
            raise ConfigError(
                f"layer_floor: {text!r} names only layers with the model's own sliding window, which stays"
            )
        floors |= {layer: max(density, floors.get(layer, 0.0)) for layer in named}
    return floors


def _allowed(
    profile: Profile, options: SearchOptions, rules: Sequence[SpanRule], specs: Sequence[BudgetSpec]
) -> Booleans | None:
    """``[head, rule]``: rules that keep the floors at every profiled and budgeted length; None without floors."""
    header = profile.header
    if options.min_span is None and not options.layer_floor:
        return None
    floors = parse_floors(options.layer_floor, header.model.num_hidden_layers, header.native_layers)
    smallest = header.sink + header.block
    lengths = np.array(sorted({*profile.lengths, *(spec.length for spec in specs)}), dtype=np.int64)
    spans = np.stack([span(lengths, rule, smallest) for rule in rules])  # [rule, length]
    enough = (spans >= np.minimum(min(options.min_span or 0, int(lengths[-1])), lengths)).all(1)
    by_layer = []
    for layer in header.searchable_layers:
        floor = floors.get(layer, 0.0)
        by_layer.append(enough & (spans >= floor * lengths - 1e-9).all(1))
    return np.repeat(np.stack(by_layer), header.model.num_key_value_heads, axis=0)
