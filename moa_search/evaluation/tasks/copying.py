"""Repeat an earlier passage."""

from __future__ import annotations

from moa_search.calibration.generators import CopyGenerator
from moa_search.evaluation.tasks.base import TokenAccuracyTask

__all__ = ["CopyTask"]


class CopyTask(TokenAccuracyTask):
    """The first tokens of an earlier passage are repeated; the answer is how it goes on."""

    name = "copy"
    generator = CopyGenerator
