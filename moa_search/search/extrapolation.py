"""Losses at lengths that were never profiled, from the profiled ones nearest to them.

What a head does nearby doesn't change with the length, and keeping everything loses nothing at any length. So a
window at one length stands for the one at another whose logarithm lies at the same share of the way from the
smallest measured window to the whole length. `benchmarks/measure_extrapolation.py` compares that with windows kept in
tokens, windows kept as shares, and lines through two lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moa_search.errors import ConfigError
from moa_search.formats.profile import Profile
from moa_search.formats.tiers import PLAIN, Tier
from moa_search.search.losses import RuleLosses, losses_from, rule_losses
from moa_search.spans import SpanRule

MAX_STRETCH = 8
"""Furthest length in multiples of the longest profiled one."""

Doubles = npt.NDArray[np.float64]


def require_reachable(profile: Profile, length: int) -> None:
    """Check that losses at ``length`` can be told from the profiled ones.

    Raises:
        ConfigError: It is shorter than the shortest profiled length or beyond `MAX_STRETCH` times the longest.
    """
    shortest, longest = profile.lengths[0], profile.lengths[-1]
    if length < shortest:
        raise ConfigError(
            f"losses at {length} tokens can't be told: the shortest profiled length is {shortest}, and whether shorter "
            "prompts lose anything doesn't show in longer ones; profile at that length too"
        )
    if length > MAX_STRETCH * longest:
        raise ConfigError(
            f"losses at {length} tokens can't be told: that is beyond {MAX_STRETCH} times the longest profiled length, "
            f"{longest}, further than was ever compared with measured losses; profile at {-(-length // MAX_STRETCH)} "
            "tokens or more"
        )


def extrapolate(
    profile: Profile,
    rules: Sequence[SpanRule],
    criterion: str,
    length: int,
    *,
    anchor: str = "position",
    tiers: Sequence[Tier] = (PLAIN,),
) -> RuleLosses:
    """Losses of every rule under every tier at any length within reach of the profiled ones.

    Between two profiled lengths each contributes by its nearness in log length; beyond the longest, that one alone
    tells. The ranking of heads and rules carries over; the total may be off by a factor of three either way.

    Args:
        profile: Statistics.
        rules: Candidate rules.
        criterion: One of `moa_search.formats.criteria.CRITERIA`.
        length: Tokens. A profiled length gives what `rule_losses` does.
        anchor: One of `moa_search.search.losses.ANCHORS`.
        tiers: Bits of keys and of values.

    Returns:
        Losses with standard errors over the samples that they come from; how well one length tells another is not
        in them.

    Raises:
        ConfigError: The length is out of reach, or the criterion or anchor unknown.
        ProfilingError: The criterion's statistics can't be used.
    """
    require_reachable(profile, length)

    def stretched(profiled: int) -> RuleLosses:
        entry = profile.by_length[profiled]
        nearest = entry.header.windows[0]

        def profiled_window(windows: Doubles) -> Doubles:
            return _stand_in(windows, nearest, length, profiled)

        return losses_from(
            entry,
            profile,
            rules,
            criterion,
            length=length,
            anchor=anchor,
            profiled_window=profiled_window,
            tiers=tiers,
        )

    if length in profile.by_length:
        measured = rule_losses(profile, rules, criterion, anchor=anchor, tiers=tiers)
        return next(found for found in measured if found.length == length)
    below = max(profiled for profiled in profile.lengths if profiled < length)
    if below == profile.lengths[-1]:
        return stretched(below)
    above = min(profiled for profiled in profile.lengths if profiled > length)
    share = np.log(length / below) / np.log(above / below)
    return _blend(stretched(below), stretched(above), float(share))


def _stand_in(windows: Doubles, nearest: int, length: int, profiled: int) -> Doubles:
    """The windows at ``profiled`` tokens that stand for ``windows`` at ``length`` tokens."""
    if min(length, profiled) <= nearest:
        return windows  # all that was measured is nearby
    power = np.log(profiled / nearest) / np.log(length / nearest)
    return np.asarray(nearest * (np.maximum(windows, nearest) / nearest) ** power)


def _blend(first: RuleLosses, second: RuleLosses, share: float) -> RuleLosses:
    """``(1 - share) first + share second``; the samples of the two are independent of each other.

    The samples become as many stand-ins whose mean and standard error, of every choice, are the blend's.
    """
    mean = (1 - share) * first.mean + share * second.mean
    if first.error is not None and second.error is not None:
        return RuleLosses(first.length, mean, None, np.hypot((1 - share) * first.error, share * second.error))
    parts = [(weight, part.mean, part.per_sample) for part, weight in ((first, 1 - share), (second, share))]
    count = sum(len(samples) for _, _, samples in parts if samples is not None)
    stand_ins = [
        mean + weight * np.sqrt(count * (count - 1) / (len(samples) * max(len(samples) - 1, 1))) * (samples - own)
        for weight, own, samples in parts
        if samples is not None
    ]
    return RuleLosses(first.length, mean, np.concatenate(stand_ins), None)
