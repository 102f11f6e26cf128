"""How many requests run at once in equal KV memory, dense and under plans, by vLLM's own block pool.

    .venv-vllm/bin/python vllm-plugin/benchmarks/capacity.py --lengths 1024 2048 --output capacity.csv

vLLM's scheduler and pool get more requests than fit, and the blocks that they ask for; a row says what was there when
most tokens were held, up to the end of the first answer. The model has the demo model's KV heads and random weights.
Attention under a plan isn't computed: no block depends on it. Each variant runs in a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLANS = ROOT / "profiles" / "smollm2-135m-instruct"
DENSE_PAGE = 32


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048], help="tokens per prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens per answer")
    parser.add_argument("--plans", nargs="+", default=["half", "quarter", "eighth"], help="shipped ones, or files")
    parser.add_argument("--fitting", type=int, default=4, help="dense requests that the pool holds")
    parser.add_argument("--page", type=int, default=16, help="tokens per block")
    parser.add_argument("--chunk", type=int, default=512, help="tokens per step")
    parser.add_argument("--groups", type=int, help="groups of KV heads; by default the plug-in's")
    parser.add_argument("--output", default="capacity.csv")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**json.loads(options.one))))
        return
    rows = []
    for length in options.lengths:
        for plan in ["dense", *options.plans]:
            job = {"plan": plan, "length": length}
            job |= {name: getattr(options, name) for name in ("new", "groups", "fitting", "page", "chunk")}
            command = [sys.executable, __file__, "--one", json.dumps(job)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = json.loads(output.splitlines()[-1])
            dense = rows[-1 - options.plans.index(plan)] if plan != "dense" else row
            row["times_dense"] = round(row["running_tokens"] / dense["running_tokens"], 2)
            rows.append(row)
            print(row, flush=True)
            with open(options.output, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


def measure(
    plan: str, length: int, new: int, groups: int | None, fitting: int, page: int, chunk: int
) -> dict[str, object]:
    """One variant's row."""
    sys.path[:0] = [str(ROOT / "vllm-plugin" / "tests")]
    import conftest  # noqa: F401  environment variables
    from engines import Engine
    from moa_vllm.backend import SpanImpl

    def not_computed(self: SpanImpl, *arguments: object, output: Any, **options: object) -> Any:
        return output.zero_()

    SpanImpl.forward = not_computed  # type: ignore[assignment,method-assign]
    longest = -(-(length + new) // 64) * 64
    dense = plan == "dense"
    with tempfile.TemporaryDirectory() as folder:
        heads = small_model(Path(folder))
        engine = Engine(
            folder,
            None if dense else plan_file(plan),
            poisoned=False,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_batched_tokens=chunk,
            block_size=DENSE_PAGE if dense else page,
            kv_cache_memory_bytes=(fitting * longest + DENSE_PAGE) * heads * 2 * 64 * 4,
            additional_config={} if groups is None or dense else {"moa_groups": groups},
            enable_prefix_caching=False,
        )
        draw = random.Random(0)
        requests = fitting * 10
        prompts = [[draw.randrange(512) for _ in range(length)] for _ in range(requests)]
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, new, detokenize=False)
        trace = engine.drain_until_first_ends()
    share = (
        {"attended": 1.0, "grouped": 1.0}
        if dense
        else shares(plan_file(plan), len(engine.groups), trace.running_tokens // trace.running)
    )
    bytes_held = trace.used_blocks * engine.bytes_per_block
    return {
        "length": length,
        "plan": plan,
        "groups": len(engine.groups),
        "pool_mib": round(engine.pool.num_gpu_blocks * engine.bytes_per_block / 2**20, 1),
        "running": trace.running,
        "running_tokens": trace.running_tokens,
        "held_of_dense": round(bytes_held / (trace.running_tokens * heads * 2 * 64 * 4), 3),
        **share,
        "in_flight": engine.engine.vllm_config.max_in_flight_tokens,
        "preempted": trace.preempted,
        "waiting": len(engine.scheduler.waiting),
        "thread_seconds": round(trace.seconds, 1),
    }


def plan_file(plan: str) -> Path:
    """A shipped plan by name, or a file."""
    return Path(plan) if plan.endswith(".json") else PLANS / f"{plan}.json"


def shares(file: Path, groups: int, length: int) -> dict[str, float]:
    """What heads attend, and what their groups hold, of a dense cache; blocks and chunks aside."""
    from moa_search import Plan
    from moa_search.formats.paged import grouped
    from moa_search.spans import span

    plan = Plan.load(file)
    rules = [rule for layer in plan.rules for rule in layer]
    attended = sum(span(length, rule, plan.min_span) for rule in rules) / (len(rules) * length)
    return {"attended": round(attended, 3), "grouped": round(grouped(plan, length, groups).held(length), 3)}


def small_model(folder: Path) -> int:
    """Write the configuration of a model with the demo model's attention; returns its KV heads."""
    from transformers import AutoConfig

    from moa_search.modeling.source import find_source

    config = AutoConfig.from_pretrained(find_source("demo").name)
    config.intermediate_size, config.vocab_size = 64, 512
    config.head_dim = 64
    config.save_pretrained(folder)
    return int(config.num_hidden_layers * config.num_key_value_heads)


if __name__ == "__main__":
    main()
