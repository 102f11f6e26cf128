"""From a profile's statistics to the loss of every rule for every KV head, under one criterion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest
from moa_search.formats.profile import LengthProfile, Profile
from moa_search.spans import SpanRule, span

__all__ = ["CRITERIA", "RuleLosses", "require_criterion", "rule_losses"]

CRITERIA = ("squared", "root_squared", "signed", "absolute", "elementwise", "recall")
"""How a rule's effect on a head is summed up.

* ``squared``: mean over samples of the sum of squared per-row loss changes; ``root_squared`` its root.
* ``signed``: mean over samples of the absolute net loss change.
* ``absolute``: sum of absolute per-row loss changes.
* ``elementwise``: MoA's criterion, the sum over masked entries of each one's absolute effect.
* ``recall``: attention mass that is lost; needs no gradient.
"""

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RuleLosses:
    """Losses at one length.

    Attributes:
        length: Tokens.
        mean: ``[head, rule]``, heads in layer-major order, without those of native layers.
        per_sample: ``[sample, head, rule]`` where the criterion is kept per sample, else None.
        error: ``[head, rule]``, standard errors where it isn't, else None.
    """

    length: int
    mean: Doubles
    per_sample: Doubles | None
    error: Doubles | None

    def of_choice(self, choice: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Predicted loss of giving head h the rule ``choice[h]``, with its standard error over samples.

        For criteria kept only as means the error adds up the heads' errors, an upper bound.
        """
        heads = np.arange(len(choice))
        loss = float(self.mean[heads, choice].sum())
        if self.per_sample is None:
            assert self.error is not None
            return loss, float(self.error[heads, choice].sum())
        totals = self.per_sample[:, heads, choice].sum(1)
        return loss, float(totals.std(ddof=1) / np.sqrt(len(totals))) if len(totals) > 1 else 0.0


def require_criterion(name: str) -> None:
    """Check a criterion's name.

    Raises:
        ConfigError: It is unknown.
    """
    if name not in CRITERIA:
        raise ConfigError(f"criterion {name!r} is unknown{nearest(name, CRITERIA)}; choose from {', '.join(CRITERIA)}")


def rule_losses(profile: Profile, rules: Sequence[SpanRule], criterion: str) -> list[RuleLosses]:
    """Losses of every rule at every profiled length.

    A rule's window is looked up at the middle row of each row bucket and interpolated linearly between the
    measured windows. Heads of native layers are no choices and have no losses.

    Args:
        profile: Statistics.
        rules: Candidate rules.
        criterion: One of `CRITERIA`.
    """
    require_criterion(criterion)
    return [_losses_at(profile, profile.by_length[length], rules, criterion) for length in profile.lengths]


def _losses_at(profile: Profile, entry: LengthProfile, rules: Sequence[SpanRule], criterion: str) -> RuleLosses:
    lookup = _lookup(profile, entry, rules)
    length, layers = entry.header.length, profile.header.searchable_layers

    def by_rule(statistic: npt.NDArray[np.float32]) -> Doubles:
        """``[..., layer, kv_head, bucket, window] -> [..., searchable head, rule]``."""
        values: Doubles = np.tensordot(statistic.astype(np.float64), lookup, axes=2)
        return values.take(layers, axis=-3).reshape(*values.shape[:-3], -1, len(rules))

    if criterion in ("squared", "root_squared", "signed"):
        samples = by_rule(entry.per_sample["signed" if criterion == "signed" else "squared"])
        samples = np.sqrt(np.maximum(samples, 0)) if criterion == "root_squared" else np.abs(samples)
        return RuleLosses(length, samples.mean(0), samples, None)
    mean, error = by_rule(entry.mean[criterion]), by_rule(entry.error[criterion])
    if criterion == "recall":
        whole = entry.mean["recall"][..., -1].sum(-1).take(layers, axis=0).reshape(-1, 1).astype(np.float64)
        mean = np.maximum(whole - mean, 0)
    return RuleLosses(length, mean, None, error)


def _lookup(profile: Profile, entry: LengthProfile, rules: Sequence[SpanRule]) -> Doubles:
    """Interpolation weights ``[bucket, window, rule]``."""
    length, windows = entry.header.length, np.asarray(entry.header.windows, dtype=np.int64)
    buckets, sink = entry.header.row_buckets, profile.header.sink
    rows = -(-length // buckets)
    first = np.arange(buckets, dtype=np.int64) * rows
    last = np.minimum(first + rows, length)  # context of the bucket's last row
    middle = np.clip((first + last + 1) // 2, 1, length)
    last = np.maximum(last, 1)
    weights = np.zeros((buckets, len(windows), len(rules)))
    bucket = np.arange(buckets)
    for index, rule in enumerate(rules):
        kept = span(middle, rule, sink + profile.header.block) - sink
        whole = span(last, rule, sink + profile.header.block) >= last
        wanted = np.clip(np.where(whole, windows[-1], kept), windows[0], windows[-1])
        right = np.clip(np.searchsorted(windows, wanted), 1, len(windows) - 1) if len(windows) > 1 else 0 * bucket
        left = np.maximum(right - 1, 0)
        gap = np.maximum(windows[right] - windows[left], 1)
        share = np.clip((wanted - windows[left]) / gap, 0, 1) if len(windows) > 1 else np.ones(buckets)
        weights[bucket, left, index] += 1 - share
        weights[bucket, right, index] += share
    return weights
