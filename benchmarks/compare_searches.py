"""Which criterion, and which searcher, finds the best plans? Held-out scores beside dense attention and uniform spans.

Usage:
    python benchmarks/compare_searches.py run criteria|searchers|anchors PROFILE FOLDER [--samples 40]
    python benchmarks/compare_searches.py table criteria|searchers|anchors FOLDER

``run`` scores every variant at every length and writes one CSV per cell into FOLDER; a second run goes on where the
first stopped, and several at once share the work. ``table`` prints Markdown from the CSVs.
"""

import argparse
import itertools
import os
from functools import partial
from pathlib import Path

import pandas as pd
from transformers.utils import logging

from moa_search import Plan, Profile, load_model, search_plan
from moa_search.evaluation import compare_variants, summarise
from moa_search.evaluation.compare import Variant, uniform_like, uniform_name

MEASURED = {"predict_lengths": ()}
"""Criteria and anchors are told apart by what was profiled, without looking ahead."""

ROWS = {
    "criteria": {
        name: {"criterion": name, **MEASURED} for name in ("recall", "elementwise", "absolute", "signed", "squared")
    },
    "searchers": {
        "recall": {"searcher": "recall"},
        "per-layer": {"searcher": "per-layer"},
        "duo": {"searcher": "duo"},
        "moa": {"searcher": "moa"},
        "exact": {"searcher": "exact"},
    },
    "anchors": {"prompt": {"anchor": "prompt", **MEASURED}, "exact": MEASURED},
}
"""Options of moa-search for each row."""

ONE_PLAN_PER_LENGTH = ("duo",)
"""Dense heads beside constant spans leave a budget unused at all lengths but one: in duo's favour, a plan for each."""

DENSITIES = (0.25, 0.125, 0.5)
TASKS = ("passkey", "copy")


def make_plan(
    profile: Profile, name: str, options: dict[str, object], density: float, folder: Path, length: int
) -> Plan:
    only = {}
    if name in ONE_PLAN_PER_LENGTH:
        nearest = max((known for known in profile.lengths if known <= length), default=profile.lengths[0])
        only = {"budget_lengths": [length], "length_weights": [f"{nearest}=1"]}
    path = folder / "plans" / f"{name}-{density:g}{f'-{length}' if only else ''}.json"
    if not path.exists():
        search_plan(profile, density=density, **options, **only).save(path)
    return Plan.load(path).resolve(length)


def make_variants(profile: Profile, rows: str, folder: Path, densities: list[float]) -> list[Variant]:
    variants = [Variant("dense", lambda length: None)]
    for density in densities:
        like = make_plan(profile, "exact", {}, density, folder, 0)
        variants.append(Variant(uniform_name(f"exact @ {density:g}"), partial(uniform_like, like)))
        for name, options in ROWS[rows].items():
            variants.append(
                Variant(f"{name} @ {density:g}", partial(make_plan, profile, name, options, density, folder))
            )
    return variants


def run(options: argparse.Namespace) -> None:
    logging.disable_progress_bar()
    profile, folder = Profile.load(options.profile), Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("demo")
    variants = make_variants(profile, options.rows, folder, options.densities)
    if options.only:
        variants = [variant for variant in variants if variant.name.split(" @ ")[0] in options.only]
    for variant, length, task in itertools.product(variants, options.lengths or profile.lengths, options.tasks):
        target = folder / f"{length}-{task}-{variant.name.replace(' @ ', '-')}.csv"
        claim = target.with_suffix(f".{os.getpid()}.claim")
        if target.exists() or any(folder.glob(f"{target.stem}.*.claim")):
            continue
        claim.touch()
        try:
            items = compare_variants(
                model, tokenizer, [variant], tasks=[task], lengths=[length], count=options.samples, seed=0
            )
            items.to_csv(target, index=False)
        finally:
            claim.unlink()
        print(f"{target.name}: NLL {items['nll'].mean():.3f}, score {items['score'].mean():.3f}", flush=True)


def table(rows: str, folder: Path) -> None:
    items = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("*.csv"))])
    summary = summarise(items)
    print("Means [95 % bootstrap interval]; left of gap = share of uniform's extra NLL over dense that remains\n")
    for task, length in itertools.product(TASKS, sorted(items["length"].unique())):
        here = summary[(summary["task"] == task) & (summary["length"] == length)].set_index("variant")
        if here.empty:  # a run may have been stopped midway
            continue
        counts = sorted(set(here["n"]))
        metric = items[items["task"] == task]["metric"].iloc[0]
        print(f"**{task}, {length} tokens, n = {' or '.join(map(str, counts))}**\n")
        print(f"| plan | KV kept | answer NLL | left of gap | {metric} |\n|---|---|---|---|---|")
        for name in _ordered(here.index, rows):
            row, dense = here.loc[name], here.loc["dense"]
            left = ""
            uniform = f"uniform @ {name.split(' @ ')[-1]}"
            if name != "dense" and uniform in here.index:
                left = f"{(row['nll'] - dense['nll']) / (here.loc[uniform]['nll'] - dense['nll']):.0%}"
            print(
                f"| {name} | {row['density']:.1%} | {row['nll']:.2f} [{row['nll_low']:.2f}, {row['nll_high']:.2f}] "
                f"| {left} | {row['score']:.2f} [{row['score_low']:.2f}, {row['score_high']:.2f}] |"
            )
        print()


def _ordered(measured: pd.Index, rows: str) -> list[str]:
    """The variants that were measured, by density, in the order of the rows; others, such as a tuned plan, last."""
    known = ["uniform", *ROWS[rows]]

    def place(name: str) -> tuple[float, int, str]:
        kind, _, density = name.partition(" @ ")
        return -float(density or 1), known.index(kind) if kind in known else len(known), kind

    return sorted(measured, key=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    measure, show = commands.add_parser("run"), commands.add_parser("table")
    for command in (measure, show):
        command.add_argument("rows", choices=ROWS)
    measure.add_argument("profile")
    for command in (measure, show):
        command.add_argument("folder", type=Path)
    measure.add_argument("--samples", type=int, default=40)
    measure.add_argument("--lengths", type=int, nargs="+", help="default: the profiled ones")
    measure.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    measure.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    measure.add_argument("--only", nargs="+", help="rows to measure, such as dense uniform moa; default: all")
    options = parser.parse_args()
    if options.command == "table":
        table(options.rows, options.folder)
    else:
        run(options)


if __name__ == "__main__":
    main()
