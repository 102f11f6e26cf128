"""Which way of telling losses at a length from those at other lengths finds the best plans there?

Usage: python benchmarks/measure_extrapolation.py PROFILE [PROFILE ...] [--criteria signed squared elementwise]

The profiles are of one model, with one sink and block, at different lengths; the shipped one and one made by
``moa-profile --lengths 512 --samples 16 --answers dataset --chat never`` give the table in docs/results-search-time.md.
Every length is told from each one or two others, and the plan that is optimal under the losses told is scored by the
measured ones. Prints Markdown. The ways:

* as is: rules scored at the profiled length;
* tokens: a window stands for the one of as many tokens; the largest for the whole length;
* shares: a window stands for the one of the same share of the length;
* log shares: what `moa_search.search.extrapolation` does;
* per head: of tokens, shares and log shares the one that told the head's losses at the second length from the first;
* line: linear in log length, per head and rule, through two lengths' log shares;
* half the samples: from half of those at the length itself, scored by the other half (how far noise goes).
"""

import argparse
import dataclasses
import itertools

import numpy as np

from moa_search import Profile
from moa_search.search.extrapolation import extrapolate
from moa_search.search.losses import rule_losses
from moa_search.search.rules import rule_grid
from moa_search.search.solver.exact import solve_exact
from moa_search.search.solver.problem import Problem
from moa_search.spans import span

DENSITIES = (0.5, 0.25, 0.125)


def merge(profiles, lengths):
    """The profile of ``lengths`` alone."""
    entries = {length: p.by_length[length] for p in profiles for length in p.lengths if length in lengths}
    headers = tuple(entries[length].header for length in sorted(entries))
    return Profile(profiles[0].header.model_copy(update={"lengths": headers}), entries)


def stretched(profile, rules, criterion, length, power):
    """Losses with the windows of the longest profiled length multiplied by ``(length / profiled) ** power``."""
    entry = profile.by_length[profile.lengths[-1]]
    factor = (length / entry.header.length) ** power
    windows = [*(round(window * factor) for window in entry.header.windows[:-1]), length]
    header = entry.header.model_copy(update={"length": length, "windows": tuple(windows)})
    moved = dataclasses.replace(entry, header=header)
    whole = profile.header.model_copy(update={"lengths": (header,)})
    return rule_losses(Profile(whole, {length: moved}), rules, criterion)[0].mean


def told(profile, rules, criterion, length):
    """Losses at ``length`` by every way that ``profile`` allows."""
    shortest, longest = profile.lengths[0], profile.lengths[-1]
    ways = {}
    if shortest == longest:
        ways["as is"] = rule_losses(profile, rules, criterion)[0].mean
        if longest < length:
            ways["tokens"] = stretched(profile, rules, criterion, length, 0)
            ways["shares"] = stretched(profile, rules, criterion, length, 1)
            ways["log shares"] = extrapolate(profile, rules, criterion, length).mean
    elif shortest < length < longest:
        ways["log shares"] = extrapolate(profile, rules, criterion, length).mean
    elif longest < length:
        first, second = (merge([profile], [n]) for n in profile.lengths)
        ways["per head"] = per_head(first, second, rules, criterion, length)
        one, two = (extrapolate(p, rules, criterion, length).mean for p in (first, second))
        steps = np.log(length / longest) / np.log(longest / shortest)
        ways["line"] = np.maximum(two + steps * (two - one), 0)
    return ways


def per_head(first, second, rules, criterion, length):
    """Each head's losses the way that told the second length from the first best, up to a factor."""
    known = second.lengths[0]
    grid = rule_grid([known], sink=second.header.sink, block=second.header.block)
    (measured,) = rule_losses(second, grid, criterion)
    ways = ("tokens", "shares", "log shares")
    tries = told(first, grid, criterion, known)
    fit = [np.array([np.corrcoef(*pair)[0, 1] for pair in zip(tries[w], measured.mean, strict=True)]) for w in ways]
    candidates = told(second, rules, criterion, length)
    best = np.nan_to_num(np.array(fit)).argmax(0)
    return np.array([candidates[ways[way]][head] for head, way in enumerate(best)])


def rank_correlation(first, second):
    ranks = [values.ravel().argsort(kind="stable").argsort() for values in (first, second)]
    return np.corrcoef(*ranks)[0, 1]


def true_losses(predicted, measured, rules, length, min_span):
    """Measured loss of the plan that is optimal under ``predicted``, at every density."""
    costs = np.array([[span(length, rule, min_span) for rule in rules]], dtype=np.int64)
    heads = np.arange(len(predicted))
    found = []
    for density in DENSITIES:
        limit = np.array([int(density * length * len(heads))])
        choice = solve_exact(Problem(predicted, costs, limit), time_limit_s=30).choice
        found.append(measured[heads, choice].sum())
    return found


def halves(profile, rules, criterion):
    """Per-sample losses at the only length of ``profile``, averaged over either half of its samples."""
    (losses,) = rule_losses(profile, rules, criterion)
    if losses.per_sample is None:
        return None
    order = np.random.default_rng(0).permutation(len(losses.per_sample))
    middle = len(order) // 2
    return losses.per_sample[order[:middle]].mean(0), losses.per_sample[order[middle:]].mean(0)


def rows(profiles, criterion, length):
    sink, block = profiles[0].header.sink, profiles[0].header.block
    rules = rule_grid([length], sink=sink, block=block)
    here = merge(profiles, [length])
    (losses,) = rule_losses(here, rules, criterion)
    measured = losses.mean
    yield "-", "optimal", measured, measured
    pair = halves(here, rules, criterion)
    if pair:
        yield f"{length}", "half the samples", *pair
    others = sorted({n for p in profiles for n in p.lengths} - {length})
    for sources in [[n] for n in others] + [list(pair) for pair in itertools.combinations(others, 2)]:
        for way, predicted in told(merge(profiles, sources), rules, criterion, length).items():
            yield " and ".join(map(str, sources)), way, predicted, measured


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+")
    parser.add_argument("--criteria", nargs="+", default=["signed", "squared", "elementwise"])
    options = parser.parse_args()
    profiles = [Profile.load(path) for path in options.profiles]
    lengths = sorted({n for p in profiles for n in p.lengths})
    min_span = profiles[0].header.sink + profiles[0].header.block
    print("| criterion | at | told from | way | rank correlation | told / measured | 50 % | 25 % | 12.5 % |")
    print("|---|---|---|---|---|---|---|---|---|")
    for criterion, length in itertools.product(options.criteria, lengths[1:]):
        rules = rule_grid([length], sink=profiles[0].header.sink, block=profiles[0].header.block)
        for source, way, predicted, measured in rows(profiles, criterion, length):
            scores = " | ".join(f"{v:.4g}" for v in true_losses(predicted, measured, rules, length, min_span))
            fit = f"{rank_correlation(predicted, measured):.3f} | {predicted.sum() / measured.sum():.2f}"
            print(f"| {criterion} | {length} | {source} | {way} | {fit} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
