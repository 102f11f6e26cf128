"""Does profiling the model under its plan, and searching again, find a better plan? Rounds on the demo model.

Usage:
    python scripts/reprofile_rounds.py run FOLDER [--length 1024] [--density 0.125] [--rounds 3] [--control]
    python scripts/reprofile_rounds.py table FOLDER...

Round 0 is the plan of the shipped profile. Every round profiles new samples under the last plan, averages the losses
of all profiles so far with equal weights, and searches again; its plan is accepted if its true loss on validation
prompts is lower, else the rounds end. The control averages a dense profile of the same samples instead: what more
calibration alone would have brought. Every step is a file in FOLDER; a second run goes on where the first stopped.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
from transformers.utils import logging

from moa_search import Plan, Profile, load_model, profile_model, search_plan
from moa_search.calibration import build_samples
from moa_search.evaluation import compare_variants
from moa_search.evaluation.compare import Variant
from moa_search.evaluation.scoring import score_answer
from moa_search.evaluation.statistics import bootstrap_interval
from moa_search.formats.files import atomic_write
from moa_search.formats.profile import MEAN_STATISTICS, SAMPLE_STATISTICS, LengthProfile
from moa_search.runtime import applied

SHIPPED = Path(__file__).parent.parent / "profiles" / "smollm2-135m-instruct" / "profile.safetensors"
TASKS = ("passkey", "copy")
VALIDATION_SEED = 40_000
"""Other draws than calibration and test, whose texts differ as well."""


def at_length(profile: Profile, length: int) -> Profile:
    """The part of a profile that was measured at one length."""
    entry = profile.by_length[length]
    return Profile(profile.header.model_copy(update={"lengths": (entry.header,)}), {length: entry})


def averaged(profiles: list[Profile], length: int) -> Profile:
    """A profile whose losses are the mean of those of ``profiles``, whatever their numbers of samples.

    ``signed`` becomes a loss only by the absolute value of each sample's net change, so samples are stacked, repeated
    until every profile has as many, and never added up. Standard errors are too small then; a search needs none.
    """
    entries = [profile.by_length[length] for profile in profiles]
    count = math.lcm(*(entry.header.samples for entry in entries))

    def stacked(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.repeat(array, count // len(array), axis=0) for array in arrays])

    header = entries[0].header.model_copy(update={"samples": count * len(entries)})
    mean = {name: np.mean([entry.mean[name] for entry in entries], axis=0) for name in MEAN_STATISTICS}
    per_sample = {name: stacked([entry.per_sample[name] for entry in entries]) for name in SAMPLE_STATISTICS}
    errors = {name: np.mean([entry.error[name] for entry in entries], axis=0) for name in MEAN_STATISTICS}
    entry = LengthProfile(header, stacked([entry.loss for entry in entries]), per_sample, mean, errors)
    return Profile(profiles[0].header.model_copy(update={"lengths": (header,)}), {length: entry})


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The experiment at one length and density."""

    folder: Path
    length: int
    density: float
    samples: int
    validation: int
    items: int
    loaded: tuple

    def profile(self, name: str, plan: Plan | None) -> Profile:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():  # the shipped profile's options, other samples
            options = {"answers": "dataset", "chat": "never", "seed": 1, "samples": self.samples, "under_plan": plan}
            profile_model(self.loaded, lengths=[self.length], checkpointing=False, output=str(path), **options)
            print(path.name, flush=True)
        return Profile.load(path)

    def plan(self, name: str, profiles: list[Profile]) -> Plan:
        path = self.folder / f"{name}.json"
        if not path.exists():
            averages = averaged(profiles, self.length)
            search_plan(averages, density=self.density, budget_lengths=[self.length]).save(path)
        return Plan.load(path)

    def validate(self, name: str, plan: Plan) -> float:
        """Mean loss of the plan over validation prompts in nats per answer token, tasks weighing the same."""
        path = self.folder / f"validation-{name}.csv"
        if not path.exists():
            model, tokenizer = self.loaded
            options = {"length": self.length, "count": self.validation, "seed": VALIDATION_SEED, "split": "validation"}
            rows = []
            for task in TASKS:
                samples = build_samples(tokenizer, tasks=(task,), **options)
                with applied(model, plan):
                    rows += [{"task": task, "nll": score_answer(model, sample).nll} for sample in samples]
            write(pd.DataFrame(rows), path)
        loss = pd.read_csv(path).groupby("task")["nll"].mean().mean()
        print(f"{self.density:g} {name}: validation loss {loss:.3f}", flush=True)
        return float(loss)

    def test(self, name: str, plan: Plan | None) -> None:
        path = self.folder / f"test-{name}.csv"
        if not path.exists():
            variant = Variant(name, lambda length: plan)
            options = {"tasks": TASKS, "lengths": [self.length], "count": self.items, "seed": 0}
            write(compare_variants(*self.loaded, [variant], **options), path)
            print(path.name, flush=True)

    def run(self, rounds: int, control: bool) -> None:
        profiles = [at_length(Profile.load(SHIPPED), self.length)]
        plans = {"plan-0": self.plan("plan-0", profiles)}
        best, lowest = "plan-0", self.validate("plan-0", plans["plan-0"])
        for number in range(1, rounds + 1):
            profiles.append(self.profile(f"under-plan-{number - 1}", plans[f"plan-{number - 1}"]))
            name = f"plan-{number}"
            plans[name] = self.plan(name, profiles)
            loss = self.validate(name, plans[name])
            if loss >= lowest:
                break
            best, lowest = name, loss
        (self.folder / "accepted.txt").write_text(best)
        if control:
            plans["control"] = self.plan("control", [profiles[0], self.profile("dense", None)])
            self.validate("control", plans["control"])
        for name, plan in plans.items():
            self.test(name, plan)


def write(items: pd.DataFrame, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(items.to_csv(index=False).encode())


def table(folders: list[Path]) -> None:
    print(
        "n test prompts per task; answer NLL, less that of plan-0 on the same prompts [95 % bootstrap interval], score"
    )
    print(f"\n| experiment | plan | validation NLL | {' | '.join(TASKS)} |\n|---|---|---|{'---|' * len(TASKS)}")
    for folder in folders:
        first = pd.read_csv(folder / "test-plan-0.csv")
        for path in sorted(folder.glob("test-*.csv"), key=lambda path: path.stem.replace("control", "z")):
            name = path.stem.removeprefix("test-")
            items = pd.read_csv(path)
            cells = [cell(items[items["task"] == task], first[first["task"] == task]) for task in TASKS]
            losses = pd.read_csv(folder / f"validation-{name}.csv").groupby("task")["nll"].mean()
            mark = " (accepted)" if (folder / "accepted.txt").read_text() == name else ""
            print(
                f"| {folder.name}, n = {len(items) // len(TASKS)} | {name}{mark} | {losses.mean():.3f} "
                f"({', '.join(f'{losses[task]:.2f}' for task in TASKS)}) | {' | '.join(cells)} |"
            )


def cell(items: pd.DataFrame, first: pd.DataFrame) -> str:
    change = items["nll"].to_numpy() - first["nll"].to_numpy()
    low, high = bootstrap_interval(change)
    return f"{items['nll'].mean():.3f}, {change.mean():+.3f} [{low:+.3f}, {high:+.3f}], {items['score'].mean():.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    measure = commands.add_parser("run")
    measure.add_argument("folder", type=Path)
    measure.add_argument("--length", type=int, default=1024)
    measure.add_argument("--density", type=float, default=0.125)
    measure.add_argument("--rounds", type=int, default=3)
    measure.add_argument("--samples", type=int, default=16, help="per profile")
    measure.add_argument("--validation", type=int, default=20, help="prompts per task that decide acceptance")
    measure.add_argument("--items", type=int, default=40, help="test prompts per task")
    measure.add_argument("--control", action="store_true", help="the control too")
    commands.add_parser("table").add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "table":
        table(options.folders)
        return
    logging.disable_progress_bar()
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("length", "density", "samples", "validation", "items")}
    Rounds(options.folder, **settings, loaded=load_model("demo")).run(options.rounds, options.control)


if __name__ == "__main__":
    main()
