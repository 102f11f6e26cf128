"""Find a passkey."""

from __future__ import annotations

from moa_search.calibration.generators import PasskeyGenerator
from moa_search.evaluation.tasks.base import ExactMatchTask

__all__ = ["PasskeyTask"]


class PasskeyTask(ExactMatchTask):
    """A five-digit passkey hidden in text."""

    name = "passkey"
    generator = PasskeyGenerator
