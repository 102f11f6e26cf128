"""Random cases: some always, all with ``--all-seeds``."""

from __future__ import annotations

from typing import Any

import pytest

DEFAULT_SEEDS = 60
"""Of each kernel."""


def seeds(count: int) -> list[Any]:
    """``range(count)`` for `parametrize`, those beyond the first `DEFAULT_SEEDS` marked."""
    more = [pytest.param(seed, marks=pytest.mark.seeds) for seed in range(DEFAULT_SEEDS, count)]
    return [*range(min(count, DEFAULT_SEEDS)), *more]
