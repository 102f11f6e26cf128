"""Criteria: how a profile's statistics become the loss of a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest

if TYPE_CHECKING:
    from moa_search.formats.profile_content import LengthProfile

CRITERIA = ("squared", "root_squared", "signed", "absolute", "elementwise", "recall")
"""How a rule's effect on a head is summed up.

* ``squared``: mean over samples of the sum of squared per-row loss changes; ``root_squared`` its root.
* ``signed``: mean over samples of the absolute net loss change.
* ``absolute``: sum of absolute per-row loss changes.
* ``elementwise``: MoA's criterion, the sum over masked entries of each one's absolute effect.
* ``recall``: attention mass that is lost; needs no gradient.
"""

Doubles = npt.NDArray[np.float64]


def require_criterion(name: str) -> None:
    """Check a criterion's name.

    Raises:
        ConfigError: It is unknown.
    """
    if name not in CRITERIA:
        raise ConfigError(f"criterion {name!r} is unknown{nearest(name, CRITERIA)}; choose from {', '.join(CRITERIA)}")


def statistic_of(criterion: str) -> str:
    """The statistic that a criterion is made from."""
    return "squared" if criterion == "root_squared" else criterion


def head_losses(
    entry: LengthProfile, criterion: str, over: Callable[[npt.NDArray[Any]], Doubles]
) -> tuple[Doubles, Doubles | None, Doubles | None]:
    """Losses of heads under whatever ``over`` sums the statistics for.

    Args:
        entry: Statistics at one length.
        criterion: One of `CRITERIA`.
        over: Picks each row bucket's window and sums over the buckets, ``[..., layer, kv_head, bucket, window]`` to any
            shape; linear.

    Returns:
        Means, the samples' losses where they are kept, else None, and the standard errors where they aren't.
    """
    if criterion in ("squared", "root_squared", "signed"):
        samples = over(entry.per_sample[statistic_of(criterion)])
        samples = np.abs(samples) if criterion == "signed" else np.maximum(samples, 0)
        samples = np.sqrt(samples) if criterion == "root_squared" else samples
        return samples.mean(0), samples, None
    statistic = entry.mean[criterion].astype(np.float64)
    if criterion == "recall":
        statistic = statistic[..., -1:] - statistic  # the mass that is lost
    return np.maximum(over(statistic), 0), None, over(entry.error[criterion])


def window_losses(entry: LengthProfile, criterion: str) -> tuple[Doubles, Doubles]:
    """Losses of every head when all rows attend one window (beside the sink), at the windows of the profile.

    Returns:
        Means and standard errors, ``[layer, kv_head, window]``. Errors of ``absolute``, ``elementwise`` and ``recall``
        add up those of the row buckets, an upper bound; of one sample they are 0.

    Raises:
        ConfigError: An unknown criterion.
    """
    require_criterion(criterion)
    mean, samples, error = head_losses(entry, criterion, lambda values: values.astype(np.float64).sum(-2))
    if samples is not None:
        count = len(samples)
        error = samples.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros_like(mean)
    assert error is not None
    return mean, error
