"""Answers of all environments as tables of items and of costs.

``python collect.py ITEMS PLANS_FOLDER ANSWERS.jsonl... --out FOLDER --name rivals-smollm2-135m`` writes
``rivals-smollm2-135m.csv.gz``, one row per answer (or turn of it), and ``rivals-costs-smollm2-135m.csv``, what each
variant holds. A generated answer's NLL is that of the answer that holds all that is wanted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cells import BY_TORCH, read_items
from here import plan_named

from moa_search.data import Sample
from moa_search.evaluation.compare import densities, held
from moa_search.evaluation.rivals.codes import SCHEMES
from moa_search.evaluation.scoring import AnswerScore, readings
from moa_search.formats import Plan
from moa_search.tasks import Task, require_tasks
from moa_search.tasks.ruler.records import string_match
from moa_search.tasks.ruler.task import text_of

COSTS = ["variant", "question", "length", "tokens_read", "held", "peak", "extra_passes"]


def main() -> None:
    options = _options()
    items = {item["id"]: item for item in read_items(options.items)[0]}
    tokenizer: Any = None
    if options.model:
        from moa_search.modeling.loading import load_model

        tokenizer = load_model(options.model)[1]
    plans = {path.stem: Plan.load(path) for path in options.plans.glob("*.json")}
    rows, costs, versions = [], [], set()
    for line in _lines(options.answers):
        item = items[line["id"]]
        name, question = line["rival"], line["question"]
        made = {"device": line.get("device", ""), "versions": _said(line.get("versions", {}))}
        versions.add(" ".join(made.values()))
        keys = {"task": item["task"], "length": item["length"], "variant": name, "question": question}
        mode = "generated" if "generated" in line else "forced"
        for number, (nll, score) in enumerate(_scores(item, line, tokenizer)):
            row = {**keys, "answers": mode, "item": item["number"], "turn": number, "nll": nll, "score": score}
            rows.append({**row, **made})
        if "kept" in line:
            cost = [line[key] for key in ("kept", "held", "peak", "extra_passes")]
            costs.append([name, question, item["length"], *cost])
        else:
            costs.append([name, question, item["length"], *_costs(name, item["length"], plans, options)])
    found = pd.DataFrame(rows).drop_duplicates(["task", "length", "variant", "question", "answers", "item", "turn"])
    keys = ["task", "length", "answers", "variant", "question", "item", "turn"]
    found = found.sort_values(keys).reset_index(drop=True)[[*keys, "nll", "score", "device", "versions"]]
    options.out.mkdir(exist_ok=True, parents=True)
    path = options.out / f"{options.name}.csv.gz"
    found.round(5).to_csv(path, index=False, compression={"method": "gzip", "mtime": 0})
    mean = pd.DataFrame(costs, columns=COSTS).groupby(COSTS[:3], sort=True).mean().round(4).reset_index()
    mean.to_csv(options.out / f"{options.name.replace('-', '-costs-', 1)}.csv", index=False)
    print(found.groupby(["answers", "length", "task"]).agg(rows=("nll", "size"), variants=("variant", "nunique")))
    print(*versions, sep="\n")


def _lines(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        for text in path.read_text().splitlines(keepends=True):
            if text.endswith("\n"):  # else it was cut off
                yield json.loads(text)


def _scores(item: dict[str, Any], line: dict[str, Any], tokenizer: Any) -> list[tuple[float, float]]:
    """NLL and score of an answer, or of each of its turns."""
    task: Task = require_tasks([item["task"]])[0]
    ids = np.array(item["context"] + item["question"] + item["answer"])
    supervised = None if item["supervised"] is None else np.array(item["supervised"], dtype=bool)
    sample = Sample(ids, len(item["answer"]), item["task"], item["depth"], "", item["length"], "", supervised)
    if "generated" in line:
        given = text_of(tokenizer, line["generated"])
        return [(float(np.mean(line["nll"])), string_match(item["task"].removeprefix("ruler:"), item["texts"], given))]
    counts = sample.counted
    answer = AnswerScore(np.array(line["nll"])[counts], np.array(line["correct"], dtype=bool)[counts])
    return [(score.nll, score.score) for score in readings(task, sample, answer)]


def _said(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))


def _costs(name: str, length: int, plans: dict[str, Plan], options: argparse.Namespace) -> list[float]:
    """Tokens read, bytes held, at the peak, and passes of one of this project's variants."""
    if name == "dense":
        return [1.0, *held(1, 1).values()]
    if name in SCHEMES:
        return [1.0, *held(SCHEMES[name].share(options.head_dim), options.layers).values()]
    plan = plan_named(name.removesuffix(BY_TORCH), plans, length)
    return [densities(plan, length)["density"], *held(plan.share(length), options.layers).values()]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", type=Path)
    parser.add_argument("plans", type=Path)
    parser.add_argument("answers", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/data"))
    parser.add_argument("--name", default="rivals-smollm2-135m", help="of the files")
    parser.add_argument("--layers", type=int, default=30, help="whose cache plans can shrink")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--model", help="whose tokenizer reads generated answers")
    return parser.parse_args()


if __name__ == "__main__":
    main()
