"""Generators that take turns, item by item."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from moa_search.tasks.items import Generator, Item, NoMoreRecordsError


def take_turns(names: Sequence[str], count: int) -> list[str]:
    """Whose turn each of ``count`` samples is."""
    return [names[i % len(names)] for i in range(count)]


def draw_round(
    makers: Mapping[str, Generator],
    turns: Sequence[str],
    length: int,
    seed: int,
    number: int = 0,
    *,
    depths: Sequence[float] = (),
) -> dict[str, list[Item]]:
    """One item for every turn, depths uniform within each maker; fewer where a maker's records run out.

    Args:
        makers: Generators by name.
        turns: Names, in the order in which the items are drawn.
        length: Tokens per item.
        seed: At least 0.
        number: Of the round; equal arguments draw equal items.
        depths: Taken in turn within each maker instead.

    Returns:
        Each maker's items, in order.
    """
    rng = np.random.default_rng([seed, length, number] if number else [seed, length])
    places = {name: _places(maker, turns.count(name), depths, rng) for name, maker in makers.items()}
    drawn: dict[str, list[Item]] = {name: [] for name in makers}
    for name in turns:
        try:
            drawn[name].append(makers[name].draw(length, next(places[name]), rng))
        except NoMoreRecordsError:
            continue
    return drawn


def _places(maker: Generator, count: int, depths: Sequence[float], rng: np.random.Generator) -> Iterator[float]:
    """Where the sought text of a maker's items stands."""
    if len(depths):
        return itertools.cycle(depths)
    return _stratified(count, rng) if maker.task.at_depths else itertools.repeat(0.5)


def _stratified(count: int, rng: np.random.Generator) -> Iterator[float]:
    """One uniform draw from each of ``count`` equal slices of [0, 1), in random order."""
    return iter(rng.permutation((np.arange(count) + rng.random(count)) / max(count, 1)).tolist())
