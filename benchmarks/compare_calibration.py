"""How much calibration does a plan need, and which? Held-out scores of 25 % plans of the demo model at 1k tokens.

Usage:
    python benchmarks/compare_calibration.py samples PROFILE FOLDER   plans from 2, 4, 8, 16, 32 of a profile's samples
    python benchmarks/compare_calibration.py sources FOLDER           plans from other sources and answers
    python benchmarks/compare_calibration.py table FOLDER             Markdown from what the two wrote
    python benchmarks/compare_calibration.py plot FOLDER IMAGE        score against samples

Every plan's items go into one CSV in FOLDER; a second run goes on where the first stopped.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from transformers.utils import logging

from moa_search import Plan, Profile, apply_plan, load_model, merge_profiles, profile_model, remove_plan, search_plan
from moa_search.calibration import calibrate
from moa_search.data import Sample
from moa_search.evaluation.compare import uniform_like
from moa_search.evaluation.scoring import score_answer
from moa_search.evaluation.statistics import bootstrap_interval
from moa_search.inspection.printing import Table, column, to_markdown
from moa_search.tasks import build_samples

LENGTH, DENSITY, ITEMS, CALIBRATION_SAMPLES = 1024, 0.25, 20, 16
DRAWS = {2: 4, 4: 3, 8: 3, 16: 2, 32: 1}
"""Random subsets of each size; of all samples there is one."""

ALL_TASKS = ("passkey", "copy", "multikey", "question")
KINDS = {
    "the data's answers, plain": [{"answers": "dataset", "chat": "never"}],
    "the model's answers, plain": [{"answers": "model", "chat": "never"}],
    "the model's answers, chat": [{"answers": "model", "chat": "auto"}],
    "the model's answers, chat, four tasks": [{"answers": "model", "chat": "auto", "sources": ALL_TASKS}],
    "the model's answers, half chat, four tasks": [
        {"answers": "model", "chat": chat, "sources": ALL_TASKS} for chat in ("never", "auto")
    ],
}
"""Options of moa-profile; several are pooled, each with its part of the samples."""


def held_out(model, tokenizer) -> dict[str, list[Sample]]:
    """Items of texts that calibration never used; the last two ask for the dense model's own answers in its chat."""
    plain = {
        task: build_samples(tokenizer, length=LENGTH, count=ITEMS, seed=0, split="test", tasks=[task])
        for task in ("passkey", "copy")
    }
    chat = {
        task: calibrate(
            model, tokenizer, sources=[task], lengths=[LENGTH], samples=ITEMS, seed=0, split="test", answers="model"
        ).samples
        for task in ("multikey", "question")
    }
    return {**plain, **chat}


def score(model, plan: Plan | None, by_task: dict[str, list[Sample]], **labels) -> pd.DataFrame:
    rows = []
    if plan is not None:
        apply_plan(model, plan)
    for task, items in by_task.items():
        for number, item in enumerate(items):
            answer = score_answer(model, item)
            rows.append({**labels, "task": task, "item": number, "nll": answer.nll, "right": answer.correct.mean()})
    if plan is not None:
        remove_plan(model)
    return pd.DataFrame(rows)


def subset(profile: Profile, chosen: np.ndarray) -> Profile:
    """The profile of some of the samples at `LENGTH`, for criteria that are kept per sample."""
    entry = profile.by_length[LENGTH]
    header = entry.header.model_copy(update={"samples": len(chosen)})
    part = dataclasses.replace(
        entry,
        header=header,
        loss=entry.loss[chosen],
        per_sample={name: values[chosen] for name, values in entry.per_sample.items()},
    )
    return Profile(profile.header.model_copy(update={"lengths": (header,)}), {LENGTH: part})


def compare_samples(profile: Profile, folder: Path) -> None:
    model, tokenizer = load_model("demo")
    samples = {task: items for task, items in held_out(model, tokenizer).items() if task in ("passkey", "copy")}
    rng = np.random.default_rng(0)
    for size, draws in DRAWS.items():
        for draw in range(draws):
            half = [rng.permutation(np.arange(start, 32, 2))[: size // 2] for start in (0, 1)]  # as many of each task
            target = folder / f"samples-{size:02d}-{draw}.csv"
            if not target.exists():
                plan = search_plan(subset(profile, np.sort(np.concatenate(half))), density=DENSITY)
                score(model, plan, samples, samples=size, draw=draw).to_csv(target, index=False)
                print(target.name, flush=True)


def compare_sources(folder: Path) -> None:
    model, tokenizer = load_model("demo")
    samples = held_out(model, tokenizer)
    plans: dict[str, Plan | None] = {"dense": None}
    for kind, parts in KINDS.items():
        profiles = []
        for number, options in enumerate(parts):
            path = folder / f"{kind}-{number}.safetensors"
            if not path.exists():
                profile_model(
                    "demo",
                    lengths=[LENGTH],
                    samples=CALIBRATION_SAMPLES // len(parts),
                    checkpointing=False,
                    seed=number,
                    output=str(path),
                    **options,
                )
            profiles.append(Profile.load(path))
        plans[kind] = search_plan(profiles[0] if len(profiles) == 1 else merge_profiles(profiles), density=DENSITY)
    plans["uniform"] = uniform_like(plans["the data's answers, plain"], LENGTH)
    for kind, plan in plans.items():
        target = folder / f"sources-{kind}.csv"
        if not target.exists():
            score(model, plan, samples, calibration=kind).to_csv(target, index=False)
            print(target.name, flush=True)


def table(folder: Path) -> None:
    sources = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("sources-*.csv"))])
    sizes = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("samples-*.csv"))])
    print(f"n = {ITEMS} items per cell; answer NLL [95 % bootstrap interval] / share of answer tokens ranked first\n")
    rows = [{"calibration": kind, **cells(sources, "calibration", kind)} for kind in ("dense", "uniform", *KINDS)]
    print_frame(pd.DataFrame(rows))
    rows = []
    for size in DRAWS:
        here = sizes[sizes["samples"] == size]
        worst = here.groupby("draw")["nll"].mean().max()
        draws = {"samples": size, "draws": here["draw"].nunique()}
        rows.append({**draws, **cells(sizes, "samples", size), "worst draw": f"{worst:.2f}"})
    print_frame(pd.DataFrame(rows))


def print_frame(frame: pd.DataFrame) -> None:
    print(to_markdown(Table(frame, [column(name, name) for name in frame.columns])))


def cells(items: pd.DataFrame, name: str, value: object) -> dict[str, str]:
    mine = items[items[name] == value]
    return {task: cell(mine[mine["task"] == task]) for task in items["task"].unique()}


def cell(items: pd.DataFrame) -> str:
    by_item = items.groupby("item")[["nll", "right"]].mean()  # draws of one item aren't independent
    low, high = bootstrap_interval(by_item["nll"])
    return f"{by_item['nll'].mean():.2f} [{low:.2f}, {high:.2f}] / {by_item['right'].mean():.2f}"


def plot(folder: Path, image: str) -> None:
    import matplotlib.pyplot as plt

    sizes = pd.concat([pd.read_csv(path) for path in sorted(folder.glob("samples-*.csv"))])
    sources = pd.concat([pd.read_csv(folder / f"sources-{kind}.csv") for kind in ("dense", "uniform")])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True, layout="constrained")
    for axis, task in zip(axes, ("passkey", "copy"), strict=True):
        by_draw = sizes[sizes["task"] == task].groupby(["samples", "draw"])["nll"].mean().reset_index()
        axis.plot(by_draw["samples"], by_draw["nll"], "o", color="#0072b2", alpha=0.5, label="one draw of samples")
        means = by_draw.groupby("samples")["nll"].mean()
        axis.plot(means.index, means, "-", color="#0072b2", label="mean")
        for kind, style in (("uniform", ":"), ("dense", "--")):
            level = sources[(sources["task"] == task) & (sources["calibration"] == kind)]["nll"].mean()
            axis.axhline(level, linestyle=style, color="black", linewidth=1, label=kind)
        axis.set(xscale="log", title=task, xlabel="calibration samples", xticks=list(DRAWS), xticklabels=list(DRAWS))
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("NLL per answer token (nats)")
    axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"SmolLM2-135M, {DENSITY:.0%} of the KV cache, {LENGTH} tokens, {ITEMS} held-out items", fontsize=10
    )
    figure.savefig(image, dpi=150)


def main() -> None:
    logging.disable_progress_bar()
    match sys.argv[1:]:
        case ["samples", profile, folder]:
            compare_samples(Profile.load(profile), made(folder))
        case ["sources", folder]:
            compare_sources(made(folder))
        case ["table", folder]:
            table(Path(folder))
        case ["plot", folder, image]:
            plot(Path(folder), image)
        case _:
            sys.exit(__doc__)


def made(folder: str) -> Path:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


if __name__ == "__main__":
    main()
