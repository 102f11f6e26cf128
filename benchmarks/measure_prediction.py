"""Does the predicted loss rank plans as the true one does? Random plans over spans and bits, beside ones over spans.

Usage:
    python benchmarks/measure_prediction.py PROFILE plans.csv [--model demo] [--share 0.125] [--plans 30] [--samples 8]

Every plan keeps the same share of bytes at one length. It is drawn by scrambling the losses of the exact search: those
of each head, and of each of its pairs of bits, are multiplied by exp(s x), x normal and s from 0 (the plan that a
price on bytes picks) to 3 (nearly any plan); each head takes what is then cheapest at the price that keeps the share.
Predicted is what `signed` says of the plan at that length; true is the cross-entropy of the answers under the plan less
that of dense attention, on held-out passkeys and passage copies, in turn. One row per plan is added to the CSV; a run
that is stopped goes on where it was. At the end Spearman's rank correlation of each kind, with a 95 % interval from
2,000 resamples of plans and samples together.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from moa_search import Plan, Profile, load_model
from moa_search.api.validating import held_out_loss
from moa_search.formats.tiers import PLAIN_BITS
from moa_search.options import SearchOptions
from moa_search.search.comparing import predicted_losses
from moa_search.search.searchers import find_searcher
from moa_search.search.searching import make_space, plan_of
from moa_search.search.space import SearchSpace
from moa_search.search.trade_off import unweighted

MOST_SCRAMBLED = 3.0
CRITERION = "signed"
KINDS = {"spans and bits": {}, "spans": {"tiers": [PLAIN_BITS]}}
HALVINGS = 60
RESAMPLES = 2000


def draw(space: SearchSpace, scramble: float, rng: np.random.Generator) -> Plan:
    """A plan within the budget of ``space``, from losses scrambled so much."""
    problem, losses = space.problem, space.objectives[0]
    heads, tiers, rules = len(losses), len(space.tiers), len(space.rules)
    factors = np.exp(scramble * (rng.normal(size=(heads, 1, 1)) + rng.normal(size=(heads, tiers, 1))))
    scrambled = (losses.reshape(heads, tiers, rules) * factors).reshape(heads, -1)

    def at(price: float) -> npt.NDArray[np.int64]:
        return np.asarray((scrambled + price * problem.costs[0]).argmin(1), dtype=np.int64)

    low, high = 0.0, float(scrambled.max())  # a byte is worth no more than all losses
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if problem.is_feasible(at(middle)) else (middle, high)
    return plan_of(space, find_searcher("uniform"), unweighted(space.objectives, at(high)))


def measure(profile: Profile, arguments: argparse.Namespace) -> None:
    file: Path = arguments.output
    known = set(map(tuple, read(file)[["kind", "plan"]].to_numpy())) if file.exists() else set()
    model, tokenizer = load_model(arguments.model)
    truth = held_out_loss(
        model,
        tokenizer,
        sources=("passkey", "copy"),
        lengths=[arguments.length],
        samples=arguments.samples,
        cache_folder=file.with_suffix(".losses"),
    )
    dense = truth.loss(None)
    spaces = {}
    for kind, options in ((kind, KINDS[kind]) for kind in arguments.kinds):
        asked = SearchOptions(
            kv_share=[arguments.share],
            budget_lengths=[arguments.length],
            predict_lengths=[],
            length_weights={arguments.length: 1.0},
            criterion=CRITERION,
            **options,
        )
        spaces[kind] = make_space(profile, asked, find_searcher("exact"))
    for number in range(arguments.plans):
        for kind, space in spaces.items():  # in turn, so that a run that is stopped has as many of each
            if (kind, number) in known:
                continue
            scramble = MOST_SCRAMBLED * number / max(arguments.plans - 1, 1)
            plan = draw(space, scramble, np.random.default_rng([number, list(KINDS).index(kind)]))
            predicted, error = predicted_losses(profile, plan, CRITERION)[arguments.length]
            began = time.process_time()
            difference = truth.loss(plan) - dense
            row = {"kind": kind, "plan": number, "scramble": round(scramble, 3), "share": plan.share(arguments.length)}
            row |= {"predicted": predicted, "predicted_error": error, "cpu_s": round(time.process_time() - began, 1)}
            row |= {f"difference{item}": float(value) for item, value in enumerate(difference)}
            add(file, row)
            print(f"{kind} {number}: predicted {predicted:.4f}, true {difference.mean():+.4f}", flush=True)


def add(file: Path, row: dict[str, object]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(file: Path) -> pd.DataFrame:
    return pd.read_csv(file)


def spearman(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    ranks = [pd.Series(values).rank() for values in (first, second)]
    return float(np.corrcoef(*ranks)[0, 1])


def summarise(table: pd.DataFrame) -> str:
    rng = np.random.default_rng(0)
    lines = ["| plans | n | share of bytes | true loss, less dense | Spearman [95 %] |", "|---|---|---|---|---|"]
    for kind, group in table.groupby("kind", sort=False):
        predicted = group["predicted"].to_numpy()
        by_item = group.filter(regex=r"^difference\d+$").to_numpy()  # [plan, sample]
        plans, items = by_item.shape
        found = []
        for _ in range(RESAMPLES):
            mine, drawn = rng.integers(0, plans, plans), rng.integers(0, items, items)
            found.append(spearman(predicted[mine], by_item[np.ix_(mine, drawn)].mean(1)))
        low, high = np.nanquantile(found, [0.025, 0.975])
        true = by_item.mean(1)
        lines.append(
            f"| {kind} | {plans} | {group['share'].min():.1%}-{group['share'].max():.1%} | {true.min():.3f} to "
            f"{true.max():.3f} | {spearman(predicted, true):.2f} [{low:.2f}, {high:.2f}] |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", help="with tiers")
    parser.add_argument("output", type=Path, help="CSV")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--share", type=float, default=0.125, help="of a 16-bit cache's bytes")
    parser.add_argument("--length", type=int, default=1024, help="tokens, a profiled length")
    parser.add_argument("--plans", type=int, default=30, help="of each kind")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="of plans")
    arguments = parser.parse_args()
    measure(Profile.load(arguments.profile), arguments)
    print(summarise(read(arguments.output)))


if __name__ == "__main__":
    main()
