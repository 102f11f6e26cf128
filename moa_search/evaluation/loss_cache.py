"""Losses that were measured before."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from moa_search.evaluation.result_folder import ResultFolder

LOSSES_SCHEMA: Final = "moa-losses/1"

DENSE_PLAN: Final = "dense"
"""Stands for the fingerprint of a plan where there is none."""


@dataclass(frozen=True)
class LossKey:
    """What losses depend on.

    Attributes:
        plan: Fingerprint of the plan, or `DENSE_PLAN`.
        weights: Hash of the model's weights.
        dtype: Their type.
        data: Hash of the samples.
        length: Tokens per sample.
    """

    plan: str
    weights: str
    dtype: str
    data: str
    length: int


class LossCache:
    """Losses per sample, by `LossKey`, in a `ResultFolder` or for this process alone.

    Args:
        folder: Where the files are, made with the first of them; None keeps losses in memory only.

    Raises:
        ConfigError: The folder can't be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else ResultFolder(folder, schema=LOSSES_SCHEMA, what="losses")
        self._known: dict[LossKey, tuple[float, ...]] = {}

    def get(self, key: LossKey, count: int) -> tuple[float, ...] | None:
        """The ``count`` losses kept for ``key``, in nats per answer token, or None."""
        if key not in self._known and self._folder is not None:
            found = self._folder.read(asdict(key))
            if isinstance(found, list) and all(isinstance(loss, float) and math.isfinite(loss) for loss in found):
                self._known[key] = tuple(found)
        losses = self._known.get(key)
        return losses if losses is not None and len(losses) == count else None

    def put(self, key: LossKey, losses: Sequence[float]) -> None:
        """Keep the losses of all samples of ``key``, each a finite number.

        Raises:
            ConfigError: Their file can't be written.
        """
        self._known[key] = tuple(losses)
        if self._folder is not None:
            self._folder.write(asdict(key), list(losses))
