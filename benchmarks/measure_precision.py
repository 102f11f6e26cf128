"""Answers under plans over spans and bits, beside spans alone, one precision, and every token in few bits.

    python benchmarks/measure_precision.py PROFILE FOLDER --lengths 1024 --tasks passkey copy --items 40

The tables of docs/results-precision.md. At each share of a 16-bit cache's bytes: all tokens in the bits that come
nearest, and what the exact search finds in PROFILE over spans, over spans with one number of bits (that of which it
predicts the least loss), and over both. ``--plan NAME=PLAN.json`` adds others, such as tuned ones. All answer the
same held-out items, drawn with ``--seed``; tasks are those of ``moa-eval``, in texts of one's own too, such as
``passkey:law.txt``. ``--shares`` without numbers leaves dense attention and the plans that are given. Cells are kept
in FOLDER, so a run that is stopped goes on, and FOLDER/items.csv has every item's score. Prints a table per length:
NLL in nats per answer token, score, and the difference to dense attention, over tasks and by task, with 95 %
bootstrap intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from moa_search import Plan, Profile, load_model
from moa_search.evaluation.compare import Variant
from moa_search.evaluation.suite import Evaluator, Grid, measure_grid
from moa_search.formats.tiers import PLAIN_BITS
from moa_search.options import SearchOptions
from moa_search.search.searching import search_profile
from moa_search.tasks import require_tasks

Reals = npt.NDArray[np.float64]

SHARES = (0.5, 0.25, 0.125, 0.0625)
RESAMPLES = 4000


def searched(profile: Profile, share: float, tiers: list[int], searcher: str = "exact") -> Plan:
    """What a search finds at a share of the bytes."""
    options = SearchOptions(kv_share=[share], tiers=tiers, searcher=searcher, front_steps=0)
    return search_profile(profile, options).chosen


def plans_at(profile: Profile, share: float, dense: dict[int, Plan]) -> dict[str, Plan]:
    """Plans of about one share of the bytes, by what they store.

    Args:
        profile: To search in.
        share: Of a 16-bit cache's bytes.
        dense: By bits the plan that stores every token so.
    """
    few, length = list(dense), profile.lengths[0]
    nearest = min(few, key=lambda bits: abs(np.log(dense[bits].share(length) / share)))
    single = {bits: searched(profile, share, [bits]) for bits in few}
    best = min(few, key=lambda bits: sum(metrics.loss or 0.0 for metrics in single[bits].predicted))
    return {
        f"every token in {nearest} bits": dense[nearest],
        f"spans alone, {share:.4g}": searched(profile, share, [PLAIN_BITS]),
        f"{best} bits with spans, {share:.4g}": single[best],
        f"spans and bits, {share:.4g}": searched(profile, share, [PLAIN_BITS, *few]),
    }


def interval(differences: Reals) -> str:
    """Mean of ``[task, item]`` and its interval, items resampled within each task."""
    rng = np.random.default_rng(0)
    tasks, items = differences.shape
    drawn = rng.integers(0, items, (RESAMPLES, tasks, items))
    means = np.take_along_axis(differences[None], drawn, 2).mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{differences.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def table(items: pd.DataFrame) -> str:
    """Rows of one length as a table: a line per variant, a column per task, then the difference to dense attention."""
    tasks = list(dict.fromkeys(items["task"]))
    by_task = items.pivot_table(index=["task", "item"], columns="variant", values=["nll", "score"], sort=False)
    head = ["bytes", "stored", *tasks, "NLL less dense attention's"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for variant, rows in items.groupby("variant", sort=False):
        cells, differences = [], []
        for task in tasks:
            nll, score = (by_task.loc[task][part] for part in ("nll", "score"))
            difference = nll[variant] - nll["dense"]
            differences.append(difference.to_numpy())
            cells.append(
                f"{nll[variant].mean():.2f} / {score[variant].mean():.2f}"
                + f" ({difference.mean():+.2f})" * (variant != "dense")
            )
        total = "" if variant == "dense" else interval(np.stack(differences))
        lines.append(f"| {rows['kv_share'].iloc[0]:.1%} | {variant} | {' | '.join(cells)} | {total} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", help="with tiers")
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", nargs="+", default=["passkey", "copy", "multikey", "lines", "question"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024])
    parser.add_argument("--items", type=int, default=40, help="of each task and length")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--plan", nargs="*", default=[], metavar="NAME=FILE", help="more plans")
    options = parser.parse_args()
    profile = Profile.load(options.profile)
    assert profile.header.tiers is not None, "the profile has no tiers: make it with moa-profile --tiers 16 8 4 3 2"
    others = {name: Plan.load(path) for name, path in (text.split("=", 1) for text in options.plan)}
    model, tokenizer = load_model(options.model)
    evaluator = Evaluator(model, tokenizer, options.folder / "cells")
    dense = {bits: searched(profile, 1.0, [bits], "dense-bits") for bits in profile.header.tiers.bits}
    plans: dict[str, Plan] = {}
    for share in options.shares:
        plans |= plans_at(profile, share, dense)
    variants = [Variant("dense", lambda length: None)]
    variants += [Variant(name, plan.resolve) for name, plan in (plans | others).items()]
    found = []
    for length in options.lengths:
        grid = Grid({length: options.items}, seed=options.seed)
        found.append(measure_grid(evaluator, variants, require_tasks(options.tasks), grid))
        pd.concat(found).to_csv(options.folder / "items.csv", index=False)
        print(f"\n{length} tokens, n = {options.items}\n\n{table(found[-1])}", flush=True)


if __name__ == "__main__":
    main()
