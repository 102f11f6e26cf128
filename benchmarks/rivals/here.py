"""This project's variants of `cells.STAGES`, as JSON lines: ``python here.py --items ... --model ... --out ...``.

A cell is a variant on a stage's items of one task and length, which run in batches. Lines are as the worker's
(`moa_search.evaluation.rivals.exchange`), ``rival`` being the variant's name.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from cells import BY_TORCH, STAGES, Stage, is_enough, machine, mine, of_stage, read_items

from moa_search.evaluation.compare import Variant, constant_like, uniform_like
from moa_search.evaluation.rivals.measuring import coded_variants
from moa_search.evaluation.rivals.naming import CODED, parse_rivals
from moa_search.formats import Plan
from moa_search.modeling.loading import load_model
from moa_search.runtime import applied


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model, dtype="bfloat16", device=options.device)
    items, _ = read_items(options.items)
    plans = {path.stem if path.stem != "plan" else path.parent.name: Plan.load(path) for path in options.plans}
    where = machine(model.device.type)
    done = set()
    if options.out.exists():
        done = {(line["rival"], line["id"], "generated" in line) for line in map(json.loads, options.out.open())}
    with options.out.open("a", buffering=1) as out:
        for stage, name, (task, length), part in mine(list(_cells(items, options)), *options.shard):
            missing = [item for item in part if (name, item["id"], stage.generated) not in done]
            if not missing:
                continue
            started = time.perf_counter()
            for impl in dict.fromkeys([options.impl, "torch"]):
                try:
                    with _running(name, model, plans, length, impl):
                        lines = list(_answers(model, tokenizer, missing, options.tokens, generated=stage.generated))
                except Exception:  # the cell once more in plain torch; the others go on
                    what = f"{impl} {stage.name} {name} {task} {length}"
                    trace = traceback.format_exc(limit=-4)
                    print(f"FAILED {what}\n{trace}", flush=True)
                    if "CUDA error" in trace:  # nothing runs any more in this process
                        sys.exit(1)
                    continue
                lines = [{"rival": name, "question": "unknown", "impl": impl, **line, **where} for line in lines]
                out.writelines(json.dumps(line) + "\n" for line in lines)
                break
            print(f"{stage.name} {name} {task} {length}: {time.perf_counter() - started:.1f} s", flush=True)


def _cells(
    items: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[tuple[Stage, str, tuple[str, int], list[dict[str, Any]]]]:
    """Cells, a variant's one after the other; in rounds of some items, all variants answer these before the next."""
    for stage in STAGES:
        if options.stages and stage.name not in options.stages:
            continue
        by_key: dict[tuple[str, int], list[dict[str, Any]]] = {key: [] for key in stage.items}
        for item in of_stage(items, stage):
            by_key[item["task"], item["length"]].append(item)
        size = options.round or max(stage.items.values())
        for first in range(0, max(stage.items.values()), size):
            for name, key in itertools.product(stage.here, stage.items):
                kind, _, span = name.rpartition(" ")
                if kind == "window" and not int(span) < key[1] < 1.3 * int(span):
                    continue
                if part := by_key[key][first : first + size]:
                    yield stage, name, key, part


def _running(name: str, model: Any, plans: dict[str, Plan], length: int, impl: Any) -> AbstractContextManager[Any]:
    if name in CODED:
        return coded_variants(parse_rivals([name]), model.config)[0].running(model, length)
    if name == "dense":
        return Variant(name, lambda length: None).running(model, length)
    plan, by_torch = plan_named(name.removesuffix(BY_TORCH), plans, length), name.endswith(BY_TORCH)
    return applied(model, plan, impl="torch" if by_torch else impl)


def plan_named(name: str, plans: dict[str, Plan], length: int) -> Plan:
    """A plan of ``plans``, or one with equal spans."""
    kind, _, what = name.rpartition(" ")
    if kind == "uniform like":
        return uniform_like(plans[what], length)
    return constant_like(plans["quarter"], int(what)) if kind == "window" else plans[name]


@torch.no_grad()
def _answers(
    model: Any, tokenizer: Any, items: list[dict[str, Any]], at_once: int, *, generated: bool
) -> Iterator[dict[str, Any]]:
    if generated:
        for item in items:
            yield {"id": item["id"], **_generated(model, tokenizer, item)}
        return

    def tokens(item: dict[str, Any]) -> int:
        return len(item["context"]) + len(item["question"]) + len(item["answer"])

    ordered = sorted(items, key=tokens, reverse=True)
    size = max(1, at_once // max(map(tokens, items), default=1))
    for batch in (ordered[first : first + size] for first in range(0, len(ordered), size)):
        # Padded at their ends, which no token before looks at.
        longest = tokens(batch[0])
        padded = [item["context"] + item["question"] + item["answer"] for item in batch]
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in padded]).to(model.device)
        start = min(tokens(item) - len(item["answer"]) - 1 for item in batch)  # predicts the first token of an answer
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest - start).logits
        for number, item in enumerate(batch):
            end, answer = tokens(item), len(item["answer"])
            rows, wanted = logits[number, end - answer - 1 - start : end - 1 - start], ids[number, end - answer : end]
            losses = torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="none")
            nll, correct = torch.stack([losses, (rows.argmax(-1) == wanted).float()]).tolist()
            yield {"id": item["id"], "nll": [round(one, 6) for one in nll], "correct": list(map(int, correct))}


def _generated(model: Any, tokenizer: Any, item: dict[str, Any]) -> dict[str, Any]:
    """What the model says of an answer that holds all that is wanted, and what it answers greedily.

    Greedy tokens are those of that answer up to the first that isn't ranked first, so only the others are decoded.
    """
    answer = item["answer"]

    def after(tokens: list[int], cache: Any, count: int) -> tuple[torch.Tensor, Any]:
        ids = torch.tensor([tokens], device=model.device)
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=count)
        return out.logits[0].float(), out.past_key_values

    first, cache = after(item["context"] + item["question"], None, 1)
    rest, _ = after(answer[:-1], copy.deepcopy(cache), len(answer) - 1) if len(answer) > 1 else (first[:0], None)
    logits, wanted = torch.cat([first, rest]), torch.tensor(answer, device=model.device)
    losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
    greedy = logits.argmax(-1)
    correct = (greedy == wanted).int().tolist()
    right = [*correct, 0].index(0)
    given = unread = answer[:right] + greedy[right : right + 1].tolist()  # with the token instead of the answer's
    while not is_enough(tokenizer, given, item):
        logits, cache = after(unread, cache, 1)
        unread = [int(logits.argmax(-1))]
        given = given + unread
    return {"nll": [round(loss, 6) for loss in losses], "correct": correct, "generated": given}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--plans", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--shard", type=int, nargs=2, default=[0, 1], metavar=("K", "OF"))
    parser.add_argument("--stages", nargs="*", default=[], choices=[stage.name for stage in STAGES])
    parser.add_argument("--round", type=int, help="items of each task and length that all variants answer first")
    parser.add_argument("--tokens", type=int, default=131_072, help="of items that run at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
