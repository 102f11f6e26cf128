"""Random cases: some always, all with ``--all-seeds``."""

from __future__ import annotations

from typing import Any

import pytest

DEFAULT_SEEDS = 60
"""Of each kernel."""


def seeds(count: int, default: int = DEFAULT_SEEDS) -> list[Any]:
    """``range(count)`` for `parametrize`, those beyond the first ``default`` marked."""
    more = [pytest.param(seed, marks=pytest.mark.seeds) for seed in range(default, count)]
    return [*range(min(count, default)), *more]
