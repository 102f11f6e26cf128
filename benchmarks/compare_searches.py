"""Which criterion, and which searcher, finds the best plans? Held-out scores beside dense attention and uniform spans.

Usage:
    python benchmarks/compare_searches.py run criteria|searchers|anchors PROFILE FOLDER [--samples 40]
    python benchmarks/compare_searches.py table criteria|searchers|anchors FOLDER

``run`` scores every variant at every length and writes one CSV per cell into FOLDER; a second run goes on where the
first stopped, and several at once share the work. ``table`` prints Markdown from the CSVs.
"""

import argparse
import dataclasses
import itertools
import os
from functools import partial
from pathlib import Path

import pandas as pd
from transformers.utils import logging

from moa_search import Plan, Profile, load_model, search_plan
from moa_search.evaluation import compare_variants, summarise
from moa_search.evaluation.compare import Variant, uniform_like, uniform_name
from moa_search.inspection.frames.scores import score_frame
from moa_search.inspection.printing import column, to_markdown

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
        variants = [variant for variant in variants if _kind(variant.name) in options.only]
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
    summary = summarise(pd.concat([pd.read_csv(path) for path in sorted(folder.glob("*.csv"))]))
    print("Means [95 % bootstrap interval]; left of gap = share of uniform's extra NLL over dense that remains\n")
    for (task, length), here in summary.groupby(["task", "length"], sort=False):
        shown = score_frame(_ordered(_with_gap(here), rows), f"{task}, {length} tokens", titled=("tokens",))
        gap = column("left_of_gap", "left of gap", "{:.0%}".format)
        print(to_markdown(dataclasses.replace(shown, columns=[*shown.columns, gap])))


def _with_gap(here: pd.DataFrame) -> pd.DataFrame:
    """One task and length with the column ``left_of_gap``, empty where dense or uniform spans weren't measured."""
    nll = here.set_index("variant")["nll"]

    def left(name: str) -> float | None:
        uniform = uniform_name(f"exact @ {_density(name):g}")
        if name in ("dense", uniform) or not {"dense", uniform} <= set(nll.index):
            return None
        return float((nll[name] - nll["dense"]) / (nll[uniform] - nll["dense"]))

    return here.assign(left_of_gap=here["variant"].map(left))


def _kind(name: str) -> str:
    """The row of a variant: dense, uniform, or one of `ROWS`."""
    return name.partition(" @ ")[0].split()[0]


def _density(name: str) -> float:
    return float(name.partition(" @ ")[2] or 1)


def _ordered(here: pd.DataFrame, rows: str) -> pd.DataFrame:
    """By density, in the order of the rows; others, such as a tuned plan, last."""
    known = ["dense", "uniform", *ROWS[rows]]

    def place(name: str) -> tuple[float, int, str]:
        kind = _kind(name)
        return -_density(name), known.index(kind) if kind in known else len(known), kind

    return here.set_index("variant").loc[sorted(here["variant"], key=place)].reset_index()


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
