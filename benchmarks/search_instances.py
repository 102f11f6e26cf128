"""Made-up search problems of any size whose losses behave like those of real heads.

What makes real problems hard, and is here: heads differ by orders of magnitude, and so do layers; most heads look
only near, some have long tails, some look a middle way back, and a few retrieve from anywhere; windows that are
alike lose much the same, so there are thousands of near ties; and budgets bind at lengths that were never profiled.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moa_search.search.solver.problem import Problem
from moa_search.spans import BETA_ONE, SpanRule, span

BUDGET_LENGTHS = tuple(2048 * 2**k for k in range(7))
PROFILED = {2048: 0.1, 4096: 0.2, 8192: 0.3, 32768: 0.4}
"""Lengths that the losses come from, with the weights of their sum."""

SINK = BLOCK = 64
ALPHAS = (
    *(-BLOCK * 2**k for k in range(2, 9)),
    *range(0, 513, BLOCK),
    *(BLOCK * k * 2**j for j in range(8) for k in (10, 13)),
)
BETAS_256 = (0, 2, 4, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, BETA_ONE)

KINDS = (0.5, 0.25, 0.15, 0.1)
"""Shares of heads that look near, have a long tail, look a middle way back, retrieve."""

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


BITS_PAIRS = tuple((key, value) for key in (16, 8, 4, 3, 2) for value in (16, 8, 4, 3, 2))
HEAD_DIM = 128
BITS_ERROR = {16: 0.0, 8: 3e-5, 4: 7e-3, 3: 0.03, 2: 0.13}
"""Of a vector coded in so many bits, squared and relative: what its head's loss grows with."""


def make_tiered_problem(
    layers: int, heads: int, rules: int, tiers: int, *, share: float = 0.25, seed: int = 0
) -> Problem:
    """The same with bits beside rules, under a share of a 16-bit cache's bytes at each of `BUDGET_LENGTHS`.

    Args:
        layers: Number of layers.
        heads: Of each layer.
        rules: Number of rules.
        tiers: How many of `BITS_PAIRS`, spread over all of them; the first is 16 bits.
        share: Budget at each length.
        seed: Of everything random.
    """
    spans = make_problem(layers, heads, rules, seed=seed)
    rng = np.random.default_rng(seed + 1)
    pairs = [BITS_PAIRS[i] for i in np.linspace(0, len(BITS_PAIRS) - 1, tiers).round().astype(int)]
    # Bytes of a token's key and value: codes and a scale of two bytes each; sinks stay 16 bit.
    token = [sum(HEAD_DIM * bits // 8 + (2 if bits < 16 else 0) for bits in pair) for pair in pairs]
    plain = 4 * HEAD_DIM
    costs = np.concatenate([SINK * plain + (spans.costs - SINK) * size for size in token], axis=1)
    limits = np.array([int(share * n * plain * layers * heads) for n in BUDGET_LENGTHS], dtype=np.int64)
    # Keys and values each add a part of what the head could lose, more of it for heads that are sensitive.
    worst = spans.losses.max(1)
    sensitive = [worst * rng.lognormal(0, 1.0, layers * heads) * part for part in (1.0, 0.5)]
    added = [sum(s * BITS_ERROR[bits] for s, bits in zip(sensitive, pair, strict=True)) for pair in pairs]
    noise = rng.lognormal(0, 0.1, (tiers, *spans.losses.shape))
    losses = [spans.losses + extra[:, None] * factor for extra, factor in zip(added, noise, strict=True)]
    return Problem(np.concatenate(losses, axis=1), costs, limits, heads_per_layer=heads)


def make_problem(layers: int, heads: int, rules: int, *, density: float = 0.25, seed: int = 0) -> Problem:
    """A feasible problem without a limit of rules per layer.

    Args:
        layers: Number of layers.
        heads: Of each layer.
        rules: Number of rules; none is useless, the smallest span and one that sees everything are
            among them.
        density: Budget at each of `BUDGET_LENGTHS`.
        seed: Of everything random.
    """
    rng = np.random.default_rng(seed)
    chosen = make_rules(rules, rng)
    costs = _spans(chosen, BUDGET_LENGTHS)
    size = layers * heads
    limits = np.array([int(density * length * size) for length in BUDGET_LENGTHS], dtype=np.int64)
    losses = np.zeros((size, rules))
    scale = rng.lognormal(0, 1.6, size) * np.repeat(rng.lognormal(0, 0.7, layers), heads)
    curves = Curves(size, rng)
    for length, weight in PROFILED.items():
        effect = scale * rng.lognormal(0, 0.2, size) * (length / 2048) ** 0.3
        losses += weight * effect[:, None] * curves.at(length, _spans(chosen, [length])[0])
    return Problem(losses, costs, limits, heads_per_layer=heads)


def make_rules(count: int, rng: np.random.Generator) -> list[SpanRule]:
    """``count`` rules of a grid, without those that cost as much as another one and see no more."""
    grid = [SpanRule(alpha, beta) for beta in BETAS_256 for alpha in ALPHAS if beta or alpha > 0]
    costs = _spans(grid, BUDGET_LENGTHS)
    seen = _spans(grid, list(PROFILED))
    no_dearer = (costs[:, :, None] <= costs[:, None, :]).all(0)
    no_blinder = (seen[:, :, None] >= seen[:, None, :]).all(0)
    better = no_dearer & no_blinder
    earlier = np.arange(len(grid))[:, None] < np.arange(len(grid))
    useful = np.nonzero(~(better & (~better.T | earlier)).any(0))[0]
    ends = useful[[costs[:, useful].sum(0).argmin(), seen[:, useful].sum(0).argmax()]]
    others = rng.choice(np.setdiff1d(useful, ends), count - 2, replace=False)
    return [grid[index] for index in sorted((*ends, *others))]


def _spans(rules: list[SpanRule], lengths: tuple[int, ...] | list[int]) -> Integers:
    """``[length, rule]``."""
    return np.array([[span(length, rule, SINK + BLOCK) for rule in rules] for length in lengths], dtype=np.int64)


class Curves:
    """For each head, the part of its effect that a window misses: 1 for no window, 0 for all."""

    def __init__(self, heads: int, rng: np.random.Generator) -> None:
        self._rng = rng
        kind = rng.choice(len(KINDS), heads, p=KINDS)
        mixture = rng.gamma(0.3 + 6 * np.eye(len(KINDS))[kind])  # no head is of one kind only
        self._mixture = mixture / mixture.sum(1, keepdims=True)
        self._near = rng.lognormal(np.log(200), 0.9, heads)
        self._middle = rng.lognormal(np.log(1500), 0.7, heads)
        self._tail = rng.uniform(0.3, 1.6, heads)
        self._reach = rng.lognormal(0, 0.4, heads)

    def at(self, length: int, windows: Integers) -> Doubles:
        """``[head, rule]`` for windows ``[rule]`` of a context of ``length`` tokens."""
        heads = len(self._near)
        near, middle, tail, reach = (
            (values * self._rng.lognormal(0, 0.12, heads))[:, None]
            for values in (self._near, self._middle, self._tail, self._reach)
        )
        grid, place = np.unique(np.append(windows, length), return_inverse=True)  # ascending, ends with everything
        w = grid.astype(float)
        shapes = (
            np.exp(-w / near),
            (1 + w / near) ** -tail,
            1 / (1 + (w / middle) ** 4),
            np.clip(1 - w / length, 0, 1) ** reach,
        )
        missed = np.zeros((heads, len(grid)))
        for share, shape in zip(self._mixture.T, shapes, strict=True):
            missed += share[:, None] * (shape - shape[:, -1:]) / (1 - shape[:, -1:])
        fall = -np.diff(missed, axis=1) * self._rng.lognormal(0, 0.3, (heads, len(grid) - 1))
        rest = np.append(np.cumsum(fall[:, ::-1], axis=1)[:, ::-1], np.zeros((heads, 1)), axis=1)
        return np.asarray(rest[:, place[:-1]])
