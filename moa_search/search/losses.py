"""From a profile's statistics to the loss of every rule for every KV head, under one criterion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError, ProfilingError
from moa_search.formats.criteria import head_losses, require_criterion, statistic_of
from moa_search.formats.files import nearest
from moa_search.formats.plan import Plan
from moa_search.formats.profile import Profile
from moa_search.formats.profile_content import SAMPLE_STATISTICS, LengthHeader, LengthProfile
from moa_search.formats.tiers import PLAIN, Tier, TierLength
from moa_search.spans import SpanRule, span

ANCHORS = ("position", "prompt")
"""Where a rule is evaluated: at every query's own position, or once at the total length."""

ROUNDING = 1e-6
"""Share of a statistic's largest value by which one that can't be negative may be so, from rounding."""

BLAS_TILE = 16

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RuleLosses:
    """Losses at one length.

    An option is a rule under a tier, tiers outermost: of R rules, option ``t * R + r`` is rule r under tier t.

    Attributes:
        length: Tokens.
        mean: ``[head, option]``, heads in layer-major order, without those of native layers.
        per_sample: ``[sample, head, option]`` where the criterion is kept per sample, else None.
        error: ``[head, option]``, standard errors where it isn't, else None.
    """

    length: int
    mean: Doubles
    per_sample: Doubles | None
    error: Doubles | None

    def of_choice(self, choice: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Predicted loss of giving head h the option ``choice[h]``, with its standard error over samples.

        For criteria kept only as means the error adds up the heads' errors, an upper bound.
        """
        heads = np.arange(len(choice))
        loss = float(self.mean[heads, choice].sum())
        if self.per_sample is None:
            assert self.error is not None
            return loss, float(self.error[heads, choice].sum())
        totals = self.per_sample[:, heads, choice].sum(1)
        return loss, float(totals.std(ddof=1) / np.sqrt(len(totals))) if len(totals) > 1 else 0.0

    def robust(self, k: float) -> Doubles:
        """What to minimise instead of ``mean`` to be wary of noise: ``mean`` plus ``k`` standard errors.

        A bare matrix ``[head, option]``, so that nobody reports it: `of_choice` stays the prediction.

        Raises:
            ConfigError: ``k`` isn't a finite number of at least 0, or the profile tells no errors.
        """
        if not (np.isfinite(k) and k >= 0):
            raise ConfigError(f"robust is {k:g}; it must be a finite number of standard errors, at least 0")
        if k == 0:
            return self.mean
        error = self.error
        if self.per_sample is not None and len(self.per_sample) > 1:
            error = self.per_sample.std(0, ddof=1) / np.sqrt(len(self.per_sample))
        if error is None or not error.any():
            raise ConfigError(
                f"robust is {k:g}, but one sample at {self.length} tokens tells no standard error; profile more samples"
            )
        return self.mean + k * error


def rule_losses(
    profile: Profile,
    rules: Sequence[SpanRule],
    criterion: str,
    *,
    anchor: str = "position",
    tiers: Sequence[Tier] = (PLAIN,),
) -> list[RuleLosses]:
    """Losses of every rule under every tier at every profiled length.

    A rule's window is looked up at the middle row of each row bucket and interpolated linearly between the
    measured windows. Heads of native layers are no choices and have no losses.

    Args:
        profile: Statistics.
        rules: Candidate rules.
        criterion: One of `moa_search.formats.criteria.CRITERIA`.
        anchor: One of `ANCHORS`. With ``prompt`` every row's span is that of the whole length, as
            `Plan.anchored_at` runs it.
        tiers: Bits of keys and of values.

    Raises:
        ConfigError: An unknown criterion or anchor, or tiers that the profile doesn't hold for the criterion.
        ProfilingError: The criterion's statistics can't be used: not finite, negative where they can't be, or the
            same for every window.
    """
    return [
        losses_from(profile.by_length[length], profile, rules, criterion, length=length, anchor=anchor, tiers=tiers)
        for length in profile.lengths
    ]


def plan_losses(profile: Profile, plan: Plan, criterion: str) -> tuple[list[RuleLosses], npt.NDArray[np.int64]]:
    """Losses of a plan's options at every profiled length, and which of these each searchable head has.

    Args:
        profile: Statistics of the plan's model, with the plan's sink and block.
        plan: The plan.
        criterion: One of `moa_search.formats.criteria.CRITERIA`.
    """
    layers = profile.header.searchable_layers
    mine = [head for layer in layers for head in zip(plan.rules[layer], plan.tiers[layer], strict=True)]
    rules, tiers = sorted({rule for rule, _ in mine}), sorted({tier for _, tier in mine}, reverse=True)
    choice = np.array([tiers.index(tier) * len(rules) + rules.index(rule) for rule, tier in mine], dtype=np.int64)
    return rule_losses(profile, rules, criterion, anchor=plan.anchor, tiers=tiers), choice


def losses_from(
    entry: LengthProfile,
    profile: Profile,
    rules: Sequence[SpanRule],
    criterion: str,
    *,
    length: int,
    anchor: str = "position",
    profiled_window: Callable[[Doubles], Doubles] | None = None,
    tiers: Sequence[Tier] = (PLAIN,),
) -> RuleLosses:
    """Losses of every rule under every tier at ``length``, from statistics perhaps measured at another length.

    Args:
        entry: Statistics, one of those of ``profile``. A row bucket stands for the same share of the rows.
        profile: Sink, block and layers.
        rules: Candidate rules.
        criterion: One of `moa_search.formats.criteria.CRITERIA`.
        length: Tokens.
        anchor: One of `ANCHORS`.
        profiled_window: Turns windows at ``length`` into the measured ones that stand for them, in tokens, any
            shape; None where both are the same.
        tiers: Bits of keys and of values.

    Raises:
        ConfigError: An unknown criterion or anchor, or tiers that the profile doesn't hold for the criterion.
        ProfilingError: The criterion's statistics can't be used.
    """
    require_criterion(criterion)
    if anchor not in ANCHORS:
        raise ConfigError(f"anchor {anchor!r} is unknown{nearest(anchor, ANCHORS)}; choose from {', '.join(ANCHORS)}")
    _require_usable(entry, criterion)

    wanted = _wanted_windows(entry.header, profile, rules, length, anchor, profiled_window)
    # Many rules ask for the same windows, above all with the prompt as their anchor: look up each set once.
    distinct, rule_of = np.unique(wanted, axis=0, return_inverse=True)
    lookup = _lookup(np.asarray(entry.header.windows, dtype=np.float64), distinct)
    layers = profile.header.searchable_layers

    def summed_over(statistic: npt.NDArray[np.float32]) -> Doubles:
        """``[..., layer, kv_head, bucket, window] -> [..., searchable head, rule]``."""
        # [..., layer, kv_head, bucket, window] x [bucket, window, distinct] -> [..., layer, kv_head, distinct]
        values: Doubles = np.tensordot(statistic.astype(np.float64), lookup, axes=2)
        # Searchable layers, their heads in one axis, and for every rule the set of windows that it asks for
        return values.take(layers, axis=-3).reshape(*values.shape[:-3], -1, lookup.shape[-1]).take(rule_of, axis=-1)

    mean, samples, error = head_losses(entry, criterion, summed_over)
    if tuple(tiers) == (PLAIN,):
        return RuleLosses(length, mean, samples, error)
    coded = _coded(profile, entry.header.length, criterion)
    assert samples is not None
    noises = [coded.rounding(*tier).take(layers, axis=1).reshape(len(samples), -1) for tier in tiers]
    options = [_added(samples, noise, coded.answer_tokens, criterion) for noise in noises]
    of_options = np.concatenate(options, axis=-1)
    return RuleLosses(length, of_options.mean(0), of_options, None)


def _added(samples: Doubles, noise: Doubles, answer_tokens: npt.NDArray[np.float32], criterion: str) -> Doubles:
    """Losses of dropped tokens and of rounding together, ``[sample, searchable head, rule]``.

    Rounding counts as in a head that sees everything, whatever the rule: its change beside that by dropped tokens would
    be the noise of a few samples.

    Args:
        samples: Of rules, ``[sample, searchable head, rule]``.
        noise: `TierLength.rounding` of a tier, ``[sample, searchable head]``.
        answer_tokens: ``[sample]``.
        criterion: Which is kept by sample.
    """
    added = noise[..., None]
    if criterion == "signed":
        return samples + answer_tokens[:, None, None] * added
    if criterion == "squared":
        return samples + added
    return np.sqrt(samples**2 + added)


def _coded(profile: Profile, length: int, criterion: str) -> TierLength:
    """What the profile knows of tiers at a profiled length.

    Raises:
        ConfigError: It knows nothing, or nothing that the criterion could use.
    """
    if profile.tiers is None:
        raise ConfigError("tiers: the profile knows nothing of fewer bits; make one with moa-profile --tiers")
    if statistic_of(criterion) not in SAMPLE_STATISTICS:
        raise ConfigError(f"criterion {criterion} isn't measured for fewer bits; take signed, squared or root_squared")
    return profile.tiers.by_length[length]


def _require_usable(entry: LengthProfile, criterion: str) -> None:
    """Refuse statistics that hold nothing to choose by. Files were checked when read; profiles made in Python weren't.

    Raises:
        ProfilingError: See `rule_losses`.
    """
    name = statistic_of(criterion)
    where = f"statistic {name} at {entry.header.length} tokens"
    groups = (
        {"": entry.per_sample} if name in entry.per_sample else {"": entry.mean, "standard errors of ": entry.error}
    )
    for prefix, group in groups.items():
        low, high = float(group[name].min()), float(group[name].max())  # NaN if any entry is
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ProfilingError(f"{prefix}{where} holds values that aren't finite; profile again")
        if name != "signed" and low < -ROUNDING * high:
            raise ProfilingError(f"{prefix}{where} holds {low:.3g}, which can't be negative; profile again")
    values = (entry.per_sample if name in entry.per_sample else entry.mean)[name]
    if not values.any() or (name == "recall" and (values == values[..., -1:]).all()):
        raise ProfilingError(
            f"{where} is the same for every window, so there is nothing to choose by; profile again with samples whose "
            "answers need their context, or choose another criterion"
        )


def _wanted_windows(
    grid: LengthHeader,
    profile: Profile,
    rules: Sequence[SpanRule],
    length: int,
    anchor: str,
    profiled_window: Callable[[Doubles], Doubles] | None,
) -> Doubles:
    """The measured window that stands for each rule in each row bucket, between the smallest and largest measured.

    Returns:
        ``[rule, bucket]``.
    """
    profiled, buckets, windows = grid.length, grid.row_buckets, grid.windows
    sink, min_span = profile.header.sink, profile.header.sink + profile.header.block
    rows = -(-profiled // buckets)
    first = np.arange(buckets, dtype=np.int64) * rows
    last = np.minimum(first + rows, profiled)  # context of the bucket's last row
    middle = np.clip((first + last + 1) // 2, 1, profiled)
    # The same share of the rows at ``length``; middle rows first, then last ones.
    contexts = np.maximum(np.concatenate([middle, last]) * length // profiled, 1)
    if anchor == "prompt":
        spans = np.minimum(contexts, np.array([[span(length, rule, min_span)] for rule in rules]))
    else:
        spans = np.array([span(contexts, rule, min_span) for rule in rules])
    kept, whole = spans[:, :buckets] - float(sink), spans[:, buckets:] >= contexts[buckets:]
    if profiled_window is not None:
        kept = profiled_window(kept)
    return np.clip(np.where(whole, windows[-1], kept), windows[0], windows[-1])


def _lookup(windows: Doubles, wanted: Doubles) -> Doubles:
    """Weights that interpolate at the windows ``wanted``, ``[rule, bucket] -> [bucket, window, rule or padding]``."""
    rules, buckets = wanted.shape
    # Columns left over from BLAS's tiles would round otherwise, and a rule's loss depend on how many others are asked.
    weights = np.zeros((buckets, len(windows), -(-rules // BLAS_TILE) * BLAS_TILE))
    if len(windows) == 1:
        weights[:] = 1
        return weights
    right = np.clip(np.searchsorted(windows, wanted), 1, len(windows) - 1)
    left = right - 1
    share = (wanted - windows[left]) / (windows[right] - windows[left])
    bucket, rule = np.arange(buckets)[None, :], np.arange(rules)[:, None]
    weights[bucket, left, rule], weights[bucket, right, rule] = 1 - share, share
    return weights
