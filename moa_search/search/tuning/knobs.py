"""The few knobs that turn a profile's losses into the one loss matrix that the exact solver decodes into a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest

if TYPE_CHECKING:
    from optuna import Trial

Doubles = npt.NDArray[np.float64]
Params = dict[str, float | str]

DEPTH_KNOTS = 4
"""Depths, equally far apart from the first searchable layer to the last, that have a multiplier of their own."""

RANGES: dict[str, tuple[float, float]] = {
    "depth": (-1.5, 1.5),
    "weight": (-3.0, 3.0),
    "exponent": (0.5, 1.5),
    "layer_exponent": (-0.5, 0.5),
    "robust": (0.0, 2.0),
}
"""Range of each numeric knob; all depths share one, and so do all lengths' weights."""


@dataclass(frozen=True)
class Knobs:
    """One setting of all knobs; the default leaves the losses as they are and weighs all lengths equally.

    Attributes:
        depth: Logarithms of what losses are multiplied with at `DEPTH_KNOTS` depths, linear between them.
        length_log_weights: Logarithms of the weight of every length that counts but the last, whose is 0; they apply
            to losses in units of what the worst choice loses at their length.
        exponent: Influence exponent q: a head whose largest loss is s has its losses multiplied by ``s**(q - 1)``.
        layer_exponent: rho: the losses of a layer whose heads lose at most s together are divided by ``s**rho``.
        robust: Standard errors that are added to every loss; `weigh` expects losses that have them already.
        criterion: Criterion of the losses; `weigh` expects losses of that criterion.
        density: Budget, where the study searches over densities too, else None.
    """

    depth: tuple[float, ...] = (0.0,) * DEPTH_KNOTS
    length_log_weights: tuple[float, ...] = ()
    exponent: float = 1.0
    layer_exponent: float = 0.0
    robust: float = 0.0
    criterion: str = "signed"
    density: float | None = None


@dataclass(frozen=True)
class KnobSpace:
    """Which knobs there are, in which ranges.

    The sink is no knob: every number in a profile was measured with the profile's own.

    Attributes:
        lengths: Lengths that count, profiled or predicted, in tokens, increasing.
        criteria: Criteria to choose from, the default first.
        fixed: Values by parameter name of knobs that aren't searched.
        densities: Smallest and largest density where the density is a knob, else None.
    """

    lengths: tuple[int, ...]
    criteria: tuple[str, ...] = ("signed",)
    fixed: Mapping[str, float | str] = field(default_factory=dict)
    densities: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.densities is not None and not 0 < self.densities[0] < self.densities[1] <= 1:
            low, high = self.densities
            raise ConfigError(f"densities from {low:g} to {high:g}: give a smaller and a larger one over 0, at most 1")
        for name, value in self.fixed.items():
            self._check_fixed(name, value)

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lower and upper end of every numeric parameter, fixed ones included."""
        ranges = {f"depth_{knot}": RANGES["depth"] for knot in range(DEPTH_KNOTS)}
        ranges |= {f"weight_{length}": RANGES["weight"] for length in self.lengths[:-1]}
        ranges |= {name: RANGES[name] for name in ("exponent", "layer_exponent", "robust")}
        return ranges if self.densities is None else {**ranges, "density": self.densities}

    @property
    def default(self) -> Knobs:
        """The plain problem, with all fixed knobs as fixed; of densities, the largest."""
        criterion = self.fixed.get("criterion", self.criteria[0])
        params: Params = {**self._neutral(), **self.fixed, "criterion": criterion}
        return self._build(params)

    def suggest(self, trial: Trial) -> Knobs:
        """The knobs of an Optuna trial."""
        params: Params = dict(self.fixed)
        for name, (low, high) in self.ranges.items():
            if name not in params:
                params[name] = trial.suggest_float(name, low, high, log=name == "density")
        if "criterion" not in params:
            several = len(self.criteria) > 1
            params["criterion"] = trial.suggest_categorical("criterion", self.criteria) if several else self.criteria[0]
        return self._build(params)

    def to_params(self, knobs: Knobs) -> Params:
        """Parameters of a trial that gives ``knobs``, cut to the ranges; fixed ones aren't among them.

        Raises:
            ConfigError: The knobs are of other lengths, of a criterion that isn't to choose from, or name no density
                where that is a knob.
        """
        if len(knobs.length_log_weights) != len(self.lengths) - 1:
            raise ConfigError(f"knobs with {len(knobs.length_log_weights)} weights for {len(self.lengths)} lengths")
        values: dict[str, float | None] = {f"depth_{knot}": value for knot, value in enumerate(knobs.depth)}
        weights = zip(self.lengths[:-1], knobs.length_log_weights, strict=True)
        values |= {f"weight_{length}": value for length, value in weights}
        values |= {"exponent": knobs.exponent, "layer_exponent": knobs.layer_exponent, "robust": knobs.robust}
        values["density"] = knobs.density
        params: Params = {}
        for name, (low, high) in self.ranges.items():
            value = values[name]
            if value is None:
                raise ConfigError("knobs without a density in a study whose knobs include it")
            if name not in self.fixed:
                params[name] = min(max(value, low), high)
        if len(self.criteria) > 1 and "criterion" not in self.fixed:
            if knobs.criterion not in self.criteria:
                raise ConfigError(f"criterion {knobs.criterion!r} isn't among {', '.join(self.criteria)}")
            params["criterion"] = knobs.criterion
        return params

    def from_params(self, params: Mapping[str, float | str]) -> Knobs:
        """The knobs of a trial's parameters; those it lacks are fixed or neutral."""
        criterion = self.criteria[0]
        return self._build({**self._neutral(), "criterion": criterion, **params, **self.fixed})

    def of_weights(self, weights: Sequence[float]) -> Knobs:
        """The default with other weights of the lengths, in units of the worst loss at each; zeros are allowed."""
        if len(weights) != len(self.lengths) or max(weights) <= 0 or min(weights) < 0:
            raise ConfigError(f"weights {list(weights)} don't weigh {len(self.lengths)} lengths")
        low, high = RANGES["weight"]
        logs = [math.log(max(weight / max(weights), 1e-9)) for weight in weights]
        relative = tuple(min(max(value - logs[-1], low), high) for value in logs[:-1])
        return self.from_params({**self.to_params(self.default), **self._weight_params(relative)})

    def _weight_params(self, logs: Sequence[float]) -> Params:
        return {f"weight_{length}": value for length, value in zip(self.lengths, logs, strict=False)}

    def _neutral(self) -> Params:
        neutral: Params = dict.fromkeys(self.ranges, 0.0)
        neutral["exponent"] = 1.0
        if self.densities is not None:
            neutral["density"] = self.densities[1]
        return neutral

    def _build(self, params: Params) -> Knobs:
        density = params.get("density")
        return Knobs(
            depth=tuple(float(params[f"depth_{knot}"]) for knot in range(DEPTH_KNOTS)),
            length_log_weights=tuple(float(params[f"weight_{length}"]) for length in self.lengths[:-1]),
            exponent=float(params["exponent"]),
            layer_exponent=float(params["layer_exponent"]),
            robust=float(params["robust"]),
            criterion=str(params["criterion"]),
            density=None if density is None else float(density),
        )

    def _check_fixed(self, name: str, value: float | str) -> None:
        ranges = self.ranges
        if name == "criterion":
            if value not in self.criteria:
                raise ConfigError(f"criterion {value!r} isn't among {', '.join(self.criteria)}")
        elif name not in ranges:
            raise ConfigError(f"knob {name!r} is unknown{nearest(name, [*ranges, 'criterion'])}")
        elif not isinstance(value, (int, float)) or not ranges[name][0] <= value <= ranges[name][1]:
            low, high = ranges[name]
            raise ConfigError(f"knob {name} can't be {value!r}; it goes from {low:g} to {high:g}")


def unit_losses(losses_by_length: Sequence[Doubles]) -> list[Doubles]:
    """Losses in units of what the worst choice loses at their length, where anything is lost there."""
    worst = [float(losses.max(1).sum()) for losses in losses_by_length]
    return [losses / (total or max(worst) or 1.0) for losses, total in zip(losses_by_length, worst, strict=True)]


def weigh(losses_by_length: Sequence[Doubles], heads_per_layer: int, knobs: Knobs) -> Doubles:
    """The one loss matrix that the exact solver then minimises.

    Args:
        losses_by_length: One ``[head, rule]`` per length that counts, non-negative, heads in layer-major order and
            without those of native layers; of ``knobs.criterion``, with ``knobs.robust`` standard errors in them.
        heads_per_layer: KV heads of a layer.
        knobs: The setting.

    Returns:
        ``[head, rule]``, non-negative; zero where the losses are.
    """
    assert len(knobs.length_log_weights) == len(losses_by_length) - 1, "one weight per length but the last"
    weights = np.exp([*knobs.length_log_weights, 0.0])
    units = unit_losses(losses_by_length)
    total: Doubles = np.sum([weight * losses for weight, losses in zip(weights, units, strict=True)], axis=0)
    total = total * _power(total.max(1), knobs.exponent - 1)[:, None]
    layer_scales = total.max(1).reshape(-1, heads_per_layer).sum(1)
    layers = len(layer_scales)
    knots = np.linspace(0, layers - 1, len(knobs.depth))
    depth = np.exp(np.interp(np.arange(layers), knots, knobs.depth)) if layers > 1 else np.exp(knobs.depth[:1])
    factors = depth * _power(layer_scales, -knobs.layer_exponent)
    return np.asarray(total * np.repeat(factors, heads_per_layer)[:, None])


def _power(scales: Doubles, exponent: float) -> Doubles:
    """``scales**exponent``, and 1 where nothing is lost, so that zero losses stay zero."""
    return np.asarray(np.where(scales > 0, scales, 1.0) ** exponent)
