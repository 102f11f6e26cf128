"""Gap and CPU seconds of the exact search, beside the same problem as one plain integer program on HiGHS.

Usage: OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/measure_search.py [--json] [--sizes 30x3x50 ...]
           [--limits none 2] [--time-limit 60] [--methods exact milp] [--gap 1e-4] [--density 0.25] [--rounds 1]

       OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/measure_search.py \\
           --sizes 30x3x320x25 80x8x30x8 80x8x320x16 --limits none --methods exact pairs --density 0.125 --rounds 3

Half an hour, most of it plain HiGHS; with --methods exact a minute or two.

Problems are made up (`search_instances`): layers x heads x rules, or x pairs of bits under budgets in bytes, seven
budgets, with any number of rules per layer or at most two. All methods run on one thread; CPU seconds are the process's
own, with building the model. Rounds repeat a problem's methods in turn. Every choice is checked again in exact
integers. Unless told a gap, "exact" stops at its own, "milp" at HiGHS's default of 0.01 %; it isn't given the largest
problems, where building the model alone takes gigabytes. "pairs" is "exact" but that it finds what another option beats
by comparing all pairs of a head's. Time limits are of the clock on the wall: on a busy machine raise them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from search_instances import make_problem, make_tiered_problem

from moa_search.errors import SolverError
from moa_search.search.solver import exact as exact_module
from moa_search.search.solver.exact import solve_exact
from moa_search.search.solver.highs import INFINITY, Entries, solve_integer_program
from moa_search.search.solver.problem import Problem

SIZES = ("30x3x50", "32x8x100", "32x32x100", "80x8x100", "40x40x200", "120x128x200")
LIMITS = ("none", "2")
COLUMNS = ("layers", "heads", "rules", "m", "method", "objective", "bound", "gap", "cpu_s")

MILP_GAP = 1e-4
MOST_BINARIES = 500_000
"""Of a plain integer program; 120 layers of 128 heads with 200 rules have three million."""

MOST_NODES = 2**31 - 1
LOSS_SCALE = 1000.0
"""Sum of the heads' largest losses as HiGHS sees them: its tolerances are absolute."""

Found = tuple[npt.NDArray[np.int64] | None, float, str]
"""A choice, a lower bound, and a note."""


def exact(problem: Problem, time_limit_s: float, gap: float | None) -> Found:
    try:
        solution = solve_exact(problem, time_limit_s=time_limit_s, gap=gap)
    except SolverError as error:
        return None, -np.inf, str(error)
    return solution.choice, solution.bound, ""


def milp(problem: Problem, time_limit_s: float, gap: float | None) -> Found:
    """x[head, rule] and, under a limit, y[layer, rule]: x <= y and at most m of a layer's y."""
    began = time.monotonic()
    heads, rules = problem.losses.shape
    limit = problem.rules_per_layer
    pairs, uses = heads * rules, 0 if limit is None else problem.layers * rules
    if pairs + uses > MOST_BINARIES:
        return None, -np.inf, f"not tried: {pairs + uses:,} binaries, over {MOST_BINARIES:,}"
    budgets = len(problem.limits)
    head, rule = np.divmod(np.arange(pairs), rules)
    unit = problem.costs.max(1)
    entries = Entries(
        np.repeat(np.arange(budgets), pairs),
        np.tile(np.arange(pairs), budgets),
        (problem.costs / unit[:, None])[:, rule].ravel(),
    ) + Entries(budgets + head, np.arange(pairs), np.ones(pairs))
    lower = [np.full(budgets, -INFINITY), np.ones(heads)]
    upper = [problem.limits / unit, np.ones(heads)]
    if limit is not None:
        link, layer = budgets + heads, budgets + heads + pairs
        use = np.arange(uses)
        entries += Entries(link + np.arange(pairs), np.arange(pairs), np.ones(pairs))
        entries += Entries(
            link + np.arange(pairs), pairs + head // problem.heads_per_layer * rules + rule, -np.ones(pairs)
        )
        entries += Entries(layer + use // rules, pairs + use, np.ones(uses))
        lower.append(np.full(pairs + problem.layers, -INFINITY))
        upper += [np.zeros(pairs), np.full(problem.layers, float(limit))]
    scale = LOSS_SCALE / problem.losses.max(1).sum()
    outcome = solve_integer_program(
        np.append(problem.losses.ravel() * scale, np.zeros(uses)),
        entries,
        np.concatenate(lower),
        np.concatenate(upper),
        relative_gap=MILP_GAP if gap is None else gap,
        absolute_gap=0.0,
        time_limit_s=time_limit_s - (time.monotonic() - began),
        max_nodes=MOST_NODES,
    )
    if outcome.values is None:
        return None, -np.inf, f"no choice in {time_limit_s:g} s"
    return outcome.values[:pairs].reshape(heads, rules).argmax(1), outcome.bound / scale, ""


def compare_pairs(problem: Problem) -> npt.NDArray[np.bool_]:
    """What `undominated` says, by a look at all pairs of a head's rules."""
    costs, kept = problem.costs, problem.choices.copy()
    order = np.arange(costs.shape[1])
    cheaper = (costs[:, :, None] <= costs[:, None, :]).all(0)  # [a, b]: a costs no more than b anywhere
    same_cost, earlier = cheaper & cheaper.T, order[:, None] < order[None, :]
    for head, (loss, possible) in enumerate(zip(problem.losses, problem.choices, strict=True)):
        no_worse = cheaper & (loss[:, None] <= loss[None, :]) & possible[:, None]
        kept[head] &= ~(no_worse & (~(same_cost & (loss[:, None] == loss[None, :])) | earlier)).any(0)
    return kept


def pairs(problem: Problem, time_limit_s: float, gap: float | None) -> Found:
    fast, exact_module.undominated = exact_module.undominated, compare_pairs
    try:
        return exact(problem, time_limit_s, gap)
    finally:
        exact_module.undominated = fast


METHODS: dict[str, Callable[[Problem, float, float | None], Found]] = {"exact": exact, "milp": milp, "pairs": pairs}


def broken(problem: Problem, choice: npt.NDArray[np.int64]) -> str:
    """What a choice breaks, in Python's integers; empty if nothing."""
    for budget, (costs, limit) in enumerate(zip(problem.costs.tolist(), problem.limits.tolist(), strict=True)):
        if sum(costs[rule] for rule in choice.tolist()) > limit:
            return f"breaks budget {budget}"
    most = max(len(set(rules)) for rules in choice.reshape(problem.layers, -1).tolist())
    if problem.rules_per_layer is not None and most > problem.rules_per_layer:
        return f"uses {most} rules in one layer"
    return ""


def measure(problem: Problem, method: str, time_limit_s: float, stop_at: float | None) -> dict[str, object]:
    began = time.process_time()
    choice, bound, note = METHODS[method](problem, time_limit_s, stop_at)
    cpu_s = None if note.startswith("not tried") else round(time.process_time() - began, 2)
    objective = gap = None
    if choice is not None:
        note = broken(problem, choice)
        objective = problem.loss(choice)
        if not note and np.isfinite(bound):
            gap = max((objective - bound) / objective, 0.0) if objective else 0.0
    size = (problem.layers, problem.heads_per_layer, problem.losses.shape[1])
    values = (*size, problem.rules_per_layer, method, objective, bound if np.isfinite(bound) else None, gap, cpu_s)
    return {**dict(zip(COLUMNS, values, strict=True)), "note": note}


def cell(name: str, value: object) -> str:
    if value is None:
        return "none" if name == "m" else "-"
    if name == "gap":
        return f"{value:.4%}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, object]]) -> str:
    lines = [[cell(name, row[name]) for name in COLUMNS] + [str(row["note"])] for row in rows]
    lines = [[*COLUMNS, "note"], *lines]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    texts = [
        "| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([texts[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *texts[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, and nothing else")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="LxHxR", help="layers x heads x rules [x bits]")
    parser.add_argument("--limits", nargs="+", default=LIMITS, metavar="M", help="rules per layer: none, 1 or 2")
    parser.add_argument("--methods", nargs="+", default=["exact", "milp"], choices=METHODS)
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="S", help="wall seconds for one method")
    parser.add_argument("--gap", type=float, help="relative gap at which both methods stop")
    parser.add_argument("--density", type=float, default=0.25, help="budget at every length")
    parser.add_argument("--rounds", type=int, default=1, help="times that each method is measured, in turn")
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        parts = [int(part) for part in size.split("x")]
        if len(parts) == 4:
            problem = make_tiered_problem(*parts, share=arguments.density)
        else:
            problem = make_problem(*parts, density=arguments.density)
        for limit in arguments.limits:
            limited = dataclasses.replace(problem, rules_per_layer=None if limit == "none" else int(limit))
            for method in arguments.methods * arguments.rounds:
                rows.append(measure(limited, method, arguments.time_limit, arguments.gap))
                text = json.dumps(rows[-1]) if arguments.json else " ".join(cell(k, v) for k, v in rows[-1].items())
                print(text, flush=True)
    if not arguments.json:
        print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
