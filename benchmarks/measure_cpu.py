"""Prefill and decoding on a CPU, under plans and dense: the tables of docs/throughput.md.

    OMP_NUM_THREADS=1 python benchmarks/measure_cpu.py decode --lengths 1024 4096 --dtypes bfloat16 --output cpu.jsonl
    python benchmarks/measure_cpu.py decode --plans plan.json plain:plan.json --output cpu.jsonl
    python benchmarks/measure_cpu.py table --output cpu.jsonl

A plan in few bits is given as a file, its spans in 16 bits as ``plain:FILE``.

Dense is transformers' SDPA with a DynamicCache. The cells of a row take turns in one process, so that a busy machine
slows all of them; with one thread, that thread's CPU time counts, with several the clock on the wall. Times are minima.
Prefill is one forward pass of random tokens into an empty cache, with the last token's logits; decoding steps run on
caches filled with random keys and values. Rows that the output holds are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from moa_search import MoACache, apply_plan, load_model, remove_plan
from moa_search.formats import ModelSignature, Plan
from moa_search.spans import DENSE

PLANS = Path(__file__).parent.parent / "profiles" / "smollm2-135m-instruct"


def main() -> None:
    options = parsed()
    if options.what == "table":
        print_tables(rows_of(options.output))
        return
    torch.set_grad_enabled(False)
    done = {key(row) for row in rows_of(options.output)}
    for dtype in options.dtypes:
        model, _ = load_model("demo")
        model = model.to(getattr(torch, dtype)).eval()
        plans = {name: plan_named(name, model) for name in options.plans}
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batches:
                for length in options.lengths:
                    case = {"what": options.what, "dtype": dtype, "threads": threads, "batch": batch, "length": length}
                    cells = [(name, impl) for impl in options.impls for name in plans]
                    cells = [
                        cell for cell in cells if key(case | dict(zip(("plan", "impl"), cell, strict=True))) not in done
                    ]
                    if cells:
                        for row in measured(model, plans, case, [("dense", "sdpa"), *cells], options):
                            print(json.dumps(row), flush=True)
                            with options.output.open("a") as file:
                                file.write(json.dumps(row) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prefill", "decode", "table"])
    parser.add_argument("--plans", nargs="+", default=["half", "quarter", "eighth", "all-dense"])
    parser.add_argument("--impls", nargs="+", default=["cpu", "torch"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="Decoding steps of a cell in each round.")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def plan_named(name: str, model: Any) -> Plan:
    """A shipped plan, one that keeps all, or a file's (``plain:FILE``: its spans, all in 16 bits)."""
    if name.endswith(".json"):
        plan = Plan.load(name.removeprefix("plain:"))
        if not name.startswith("plain:"):
            return plan
        return Plan.from_rules(plan.rules, plan.model, sink=plan.sink, block=plan.block)
    if name == "all-dense":
        return Plan.uniform(DENSE, ModelSignature.of(model.config))
    return Plan.load(PLANS / f"{name}.json")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("what", "dtype", "threads", "batch", "length", "plan", "impl"))


def measured(
    model: Any, plans: dict[str, Plan], case: dict[str, Any], cells: list[tuple[str, str]], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for every cell but dense, whose time is in all of them."""
    clock = time.thread_time if case["threads"] == 1 else time.perf_counter
    ids = torch.randint(0, 40000, (case["batch"], case["length"]), generator=torch.Generator().manual_seed(0))
    times: dict[tuple[str, str], list[float]] = {cell: [] for cell in cells}

    def entered(cell: tuple[str, str]) -> Any:
        remove_plan(model)
        if cell[0] == "dense":
            return DynamicCache(config=model.config)
        apply_plan(model, plans[cell[0]], impl=cell[1])
        return MoACache(model.config, plans[cell[0]])

    def timed(cell: tuple[str, str], tokens: torch.Tensor, cache: Any) -> float:
        start = clock()
        model(tokens, past_key_values=cache, logits_to_keep=1)
        return clock() - start

    if case["what"] == "prefill":
        for cell in cells:
            timed(cell, ids[:, :256], entered(cell))
        for _ in range(options.rounds):
            for cell in cells:
                times[cell].append(timed(cell, ids, entered(cell)))
                gc.collect()
    else:
        caches = {cell: entered(cell) for cell in cells}
        for cache in caches.values():
            fill(cache, model, case)
        for _ in range(options.rounds):
            for cell in cells:
                entered(cell)
                timed(cell, ids[:, :1], caches[cell])
                times[cell] += [timed(cell, ids[:, :1], caches[cell]) for _ in range(options.steps)]
    remove_plan(model)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    dense = times[cells[0]]
    return [
        case
        | {"plan": plan, "impl": impl, "n": len(times[plan, impl])}
        | {"ms": ms(min(times[plan, impl])), "median_ms": ms(statistics.median(times[plan, impl]))}
        | {"dense_ms": ms(min(dense)), "dense_median_ms": ms(statistics.median(dense))}
        | {"ratio": round(min(dense) / min(times[plan, impl]), 3)}
        | versions
        for plan, impl in cells[1:]
    ]


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Times as fast as dense SDPA, a table for each kind of run."""
    kinds = list(dict.fromkeys((row["what"], row["batch"], row["threads"]) for row in rows))
    for what, batch, threads in kinds:
        chosen = [row for row in rows if (row["what"], row["batch"], row["threads"]) == (what, batch, threads)]
        lengths = sorted({row["length"] for row in chosen})
        print(f"\n{what}, batch {batch}, {threads} thread{'s' * (threads > 1)}\n")
        print(f"| type | plan | by | {' | '.join(f'{length:,}' for length in lengths)} |")
        print(f"|---|---|---|{'---|' * len(lengths)}")
        dense = {(row["dtype"], row["length"]): row["dense_ms"] for row in chosen}
        for dtype in dict.fromkeys(row["dtype"] for row in chosen):
            times = (f"{dense[dtype, length]:,.0f} ms" if (dtype, length) in dense else "" for length in lengths)
            print(f"| {dtype} | dense | SDPA | {' | '.join(times)} |")
            for plan, impl in dict.fromkeys((row["plan"], row["impl"]) for row in chosen if row["dtype"] == dtype):
                found = {
                    row["length"]: row["ratio"] for row in chosen if key(row)[1:2] + key(row)[5:] == (dtype, plan, impl)
                }
                ratios = (f"{found[length]:.2f}" if length in found else "" for length in lengths)
                print(f"| {dtype} | {plan} | {impl} | {' | '.join(ratios)} |")


def ms(seconds: float) -> float:
    return round(1000 * seconds, 2)


def fill(cache: Any, model: Any, case: dict[str, Any]) -> None:
    """As many random tokens as the case's length."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (case["batch"], case["length"], config.num_key_value_heads, config.head_dim)
    for index in range(config.num_hidden_layers):
        states = torch.randn(shape, generator=generator, dtype=torch.float32).to(model.dtype).transpose(1, 2)
        cache.update(states.contiguous(), states.contiguous(), index)
        if isinstance(cache, MoACache):
            cache.layers[index].commit(states, states, None, "auto")


if __name__ == "__main__":
    main()
