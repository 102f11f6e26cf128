"""Which criterion finds the best plans? Held-out scores of plans from each one, against dense and uniform.

Usage:
    python scripts/compare_criteria.py run PROFILE FOLDER [--samples 40] [--shard 0/2]
    python scripts/compare_criteria.py table FOLDER

``run`` scores every variant at every profiled length and writes one CSV per cell into FOLDER; a second run goes
on where the first stopped, and shards share the work among processes. ``table`` prints Markdown from the CSVs.
"""

import argparse
import itertools
from pathlib import Path

import pandas as pd
import torch
from transformers.utils import logging

from moa_search import Plan, Profile, load_model, search_plan
from moa_search.evaluation import compare_variants, summarise
from moa_search.evaluation.compare import Variant, uniform_like

CRITERIA = ("recall", "elementwise", "absolute", "signed", "squared")
DENSITIES = (0.25, 0.125, 0.5)
TASKS = ("passkey", "copy")


def make_plan(profile: Profile, criterion: str, density: float, folder: Path) -> Plan:
    path = folder / "plans" / f"{criterion}-{density:g}.json"
    if not path.exists():
        search_plan(profile, density=density, criterion=criterion).save(path)
    return Plan.load(path)


def make_variants(profile: Profile, folder: Path) -> list[Variant]:
    variants = [Variant("dense", lambda length: None)]
    for density in DENSITIES:
        plans = {name: make_plan(profile, name, density, folder) for name in CRITERIA}
        like = plans["squared"]
        variants.append(Variant(f"uniform @ {density:g}", lambda length, like=like: uniform_like(like, length)))
        variants += [Variant(f"{name} @ {density:g}", lambda length, p=plan: p) for name, plan in plans.items()]
    return variants


def run(profile_path: str, folder: Path, samples: int, shard: tuple[int, int]) -> None:
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(max(1, torch.get_num_threads() // shard[1]))
    profile = Profile.load(profile_path)
    model, tokenizer = load_model("demo")
    size = len(CRITERIA) + 1  # uniform and the criteria at one density; the first group also has dense
    variants = make_variants(profile, folder)
    groups = [variants[: size + 1], variants[size + 1 : 2 * size + 1], variants[2 * size + 1 :]]
    cells = [
        (length, task, variant)
        for group in groups  # what tells most comes first
        for length, task, variant in itertools.product(profile.lengths, TASKS, group)
    ]
    for length, task, variant in cells[shard[0] :: shard[1]]:
        target = folder / f"{length}-{task}-{variant.name.replace(' @ ', '-')}.csv"
        if target.exists():
            continue
        items = compare_variants(model, tokenizer, [variant], tasks=[task], lengths=[length], count=samples, seed=0)
        items.to_csv(target, index=False)
        print(f"{target.name}: NLL {items['nll'].mean():.3f}, score {items['score'].mean():.3f}", flush=True)


def table(folder: Path) -> None:
    items = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("*.csv"))])
    summary = summarise(items).set_index(["task", "length", "variant"])
    print(f"n = {summary['n'].min()} items per cell; means [95 % bootstrap interval]; left of gap = share of")
    print("uniform's extra NLL over dense that remains\n")
    for task, length in itertools.product(TASKS, sorted(items["length"].unique())):
        metric = items[items["task"] == task]["metric"].iloc[0]
        print(f"**{task}, {length} tokens**\n")
        print(f"| plan | KV kept | answer NLL | left of gap | {metric} |\n|---|---|---|---|---|")
        here = summary.loc[task, length]
        names = ["dense"] + [f"{n} @ {d:g}" for d in sorted(DENSITIES, reverse=True) for n in ("uniform", *CRITERIA)]
        for name in (name for name in names if name in here.index):  # a run may have been stopped midway
            row, dense = here.loc[name], here.loc["dense"]
            left = ""
            if name != "dense":
                uniform = here.loc[f"uniform @ {name.split(' @ ')[1]}"]
                left = f"{(row['nll'] - dense['nll']) / (uniform['nll'] - dense['nll']):.0%}"
            print(
                f"| {name} | {row['density']:.1%} | {row['nll']:.2f} [{row['nll_low']:.2f}, {row['nll_high']:.2f}] "
                f"| {left} | {row['score']:.2f} [{row['score_low']:.2f}, {row['score_high']:.2f}] |"
            )
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    measure = commands.add_parser("run")
    measure.add_argument("profile")
    measure.add_argument("folder", type=Path)
    measure.add_argument("--samples", type=int, default=40)
    measure.add_argument("--shard", default="0/1", help="this process's part, such as 0/2")
    commands.add_parser("table").add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        table(options.folder)
        return
    index, count = map(int, options.shard.split("/"))
    run(options.profile, options.folder, options.samples, (index, count))


if __name__ == "__main__":
    main()
