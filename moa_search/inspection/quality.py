"""Whether a profile was made from enough samples, and which heads lose most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moa_search.formats import Profile
from moa_search.search.losses import rule_losses
from moa_search.spans import BETA_ONE, SpanRule

QUARTER, EIGHTH = SpanRule(0, BETA_ONE // 4), SpanRule(0, BETA_ONE // 8)

LOCAL_SHARE = 0.01
"""A head is local if keeping an eighth of the context changes the loss by less than this share of it."""

ENOUGH, TOO_LITTLE = 0.9, 0.8
"""Reliability to aim at, and below which more samples are advised."""


@dataclass(frozen=True)
class LengthQuality:
    """Quality of a profile at one length.

    Attributes:
        length: Tokens per sample.
        samples: Samples measured.
        loss: Mean dense loss in nats per answer token.
        loss_error: Its standard error over samples.
        local_heads: Share of the searchable KV heads whose loss under a span of an eighth of the context is below
            `LOCAL_SHARE` of the dense loss.
        reliability: Share of the variance between heads, in their losses under a span of a quarter of the
            context, that isn't sampling error: 1 - mean(error^2) / variance, below 0 where the error is
            the larger. None for a single sample.
    """

    length: int
    samples: int
    loss: float
    loss_error: float
    local_heads: float
    reliability: float | None

    @property
    def samples_needed(self) -> int | None:
        """Samples for a reliability of `ENOUGH` (Spearman-Brown); None where it can't be told."""
        if self.reliability is None or self.reliability <= 0:
            return None
        odds = ENOUGH / (1 - ENOUGH) * (1 - self.reliability) / self.reliability
        return int(np.ceil(self.samples * odds))


def profile_quality(profile: Profile) -> list[LengthQuality]:
    """The quality of a profile at each of its lengths."""
    found = []
    for losses in rule_losses(profile, [QUARTER, EIGHTH], "signed"):
        dense = profile.by_length[losses.length].loss.astype(np.float64)
        count, by_head = len(dense), losses.per_sample
        assert by_head is not None
        reliability = None
        if count > 1:
            quarter = by_head[:, :, 0]
            between = quarter.mean(0).var(ddof=1) if quarter.shape[1] > 1 else 0.0
            noise = (quarter.var(0, ddof=1) / count).mean()
            reliability = float(1 - noise / between) if between > 0 else None
        found.append(
            LengthQuality(
                length=losses.length,
                samples=count,
                loss=float(dense.mean()),
                loss_error=float(dense.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0,
                local_heads=float((losses.mean[:, 1] < LOCAL_SHARE * dense.mean()).mean()),
                reliability=reliability,
            )
        )
    return found


def heaviest_heads(profile: Profile, length: int, criterion: str, most: int) -> list[tuple[int, int]]:
    """The measured heads that lose most under a window of an eighth of the length, ``(layer, kv_head)``."""
    losses, _, _ = profile.influence(length, criterion=criterion)
    measured = int(np.isfinite(losses).sum())
    ranked = np.argsort(-np.nan_to_num(losses, nan=-1.0), axis=None, kind="stable")[: min(most, measured)]
    return [(int(index) // losses.shape[1], int(index) % losses.shape[1]) for index in ranked]


def sample_advice(profile: Profile) -> str | None:
    """A warning that more samples are needed, or None."""
    for quality in profile_quality(profile):
        if quality.samples == 1:
            return f"a single sample at {quality.length} tokens says little about the heads; use at least 16"
        if quality.reliability is not None and quality.reliability < TOO_LITTLE:
            needed = quality.samples_needed
            error = min(1.0, 1 - quality.reliability)
            enough = f"about {needed} samples" if needed else "many more samples"
            return (
                f"at {quality.length} tokens {error:.0%} of the difference between heads is sampling error; "
                f"{enough} would bring it to {1 - ENOUGH:.0%}. Raise --samples, or profile with another --seed "
                "and pool both with moa-profile merge"
            )
    return None
