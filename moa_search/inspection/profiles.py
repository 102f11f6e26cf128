"""What a profile says about its samples and heads, and whether it was made from enough of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.table import Table

from moa_search.formats import Profile
from moa_search.search.losses import rule_losses
from moa_search.spans import BETA_ONE, SpanRule

__all__ = [
    "LengthQuality",
    "calibration_lines",
    "head_table",
    "heaviest_heads",
    "profile_quality",
    "profile_table",
    "sample_advice",
]

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


def profile_table(profile: Profile) -> Table:
    """Samples, loss, local heads and reliability by length; times where the run is known."""
    times = profile.run.seconds_per_sample if profile.run else {}
    table = Table("tokens", "samples", "dense loss", "local heads", "reliability", *(["s/sample"] if times else []))
    for column in table.columns:
        column.justify = "right"
    for quality in profile_quality(profile):
        cells = [
            str(quality.length),
            str(quality.samples),
            f"{quality.loss:.3f} ± {quality.loss_error:.3f}",
            f"{quality.local_heads:.0%}",
            "" if quality.reliability is None else f"{max(0.0, quality.reliability):.2f}",
        ]
        seconds = times.get(quality.length)
        table.add_row(*cells, *(["" if seconds is None else f"{seconds:.1f}"] if times else []))
    return table


def head_table(profile: Profile, length: int, criterion: str, most: int = 8) -> Table:
    """The heads that lose most under a short window, and the share of all heads' losses that they have."""
    losses, _, window = profile.influence(length, criterion=criterion)
    total = float(np.nansum(losses)) or 1.0
    table = Table(title=f"{criterion} loss, window {window} of {length}", title_justify="left")
    for name in ("layer", "KV head", "loss", "of all"):
        table.add_column(name, justify="right")
    for layer, head in heaviest_heads(profile, length, criterion, most):
        loss = float(losses[layer, head])
        table.add_row(str(layer), str(head), f"{loss:.3g}", f"{loss / total:.1%}")
    return table


def heaviest_heads(profile: Profile, length: int, criterion: str, most: int) -> list[tuple[int, int]]:
    """The measured heads that lose most under a window of an eighth of the length, ``(layer, kv_head)``."""
    losses, _, _ = profile.influence(length, criterion=criterion)
    measured = int(np.isfinite(losses).sum())
    ranked = np.argsort(-np.nan_to_num(losses, nan=-1.0), axis=None, kind="stable")[: min(most, measured)]
    return [(int(index) // losses.shape[1], int(index) % losses.shape[1]) for index in ranked]


def calibration_lines(profile: Profile) -> list[str]:
    """What the samples are, how many were dropped, and what the run took, one fact per line."""
    source, lines = profile.header.calibration, []
    sources, answered = source.get("sources"), source.get("answered")
    if isinstance(sources, list):
        own = "the model's own answers" if source.get("answers") == "model" else "the data's answers"
        chat = ", in its chat template" if source.get("chat") else ""
        made = all(str(name).startswith("samples:") for name in sources)
        lines.append(f"samples   {', '.join(map(str, sources))}" + ("" if made else f"; {own}{chat}"))
    if isinstance(answered, dict):
        for name, counts in answered.items():
            assert isinstance(counts, dict)
            tried, kept = counts.get("tried"), counts.get("kept")
            if isinstance(tried, int) and isinstance(kept, int) and tried > kept:
                lines.append(f"dropped   {name}: {tried - kept} of {tried}, answered wrongly by the dense model")
    if profile.header.native_layers:
        layers = ", ".join(map(str, profile.header.native_layers))
        lines.append(f"native    layers {layers} have a sliding window of their own and aren't searched")
    run = profile.run
    if run is not None:
        tokens = sum(entry.header.samples * length for length, entry in profile.by_length.items())
        resumed = f", {run.resumed} taken over from a stopped run" if run.resumed else ""
        kind = "GPU memory" if run.on_gpu else "memory"
        lines.append(
            f"run       {run.measured} samples measured{resumed}; {tokens:,} tokens in all; peak {kind} "
            f"{run.peak_memory_bytes / 2**30:.1f} GiB"
        )
    return lines


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
