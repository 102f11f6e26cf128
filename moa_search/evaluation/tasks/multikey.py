"""Find the passkey of one person among those of others."""

from __future__ import annotations

from moa_search.calibration.generators import MultikeyGenerator
from moa_search.evaluation.tasks.base import ExactMatchTask

__all__ = ["MultikeyTask"]


class MultikeyTask(ExactMatchTask):
    """Passkeys of three people, of which one is asked for."""

    name = "multikey"
    generator = MultikeyGenerator
