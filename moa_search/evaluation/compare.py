"""Score variants of one model (dense, plans, uniform spans) on the same held-out items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from moa_search.calibration import Sample
from moa_search.errors import ConfigError
from moa_search.evaluation.tasks import Answers, Task, require_tasks
from moa_search.formats.files import nearest
from moa_search.formats.plan import Plan
from moa_search.runtime import applied
from moa_search.spans import SpanRule

__all__ = [
    "BASELINES",
    "Variant",
    "as_it_runs",
    "compare_variants",
    "constant_like",
    "densities",
    "kept_tokens",
    "make_variants",
    "measure",
    "require_baselines",
    "under",
    "uniform_like",
]

BASELINES = ("dense", "uniform")
"""``dense`` is the untouched model; ``uniform`` gives every head, for each plan and length, one constant span that
keeps as much of the cache as the plan does (StreamingLLM's sink and window)."""


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: Shown in tables.
        plan_at: The plan for a length in tokens, or None for dense attention.
    """

    name: str
    plan_at: Callable[[int], Plan | None]


def make_variants(plans: dict[str, Plan], baselines: Sequence[str], lengths: Sequence[int]) -> list[Variant]:
    """Baselines first, then the plans in order; plans that keep equally much share one uniform baseline.

    A plan that has the name of a baseline is called ``plan`` and that name.

    Raises:
        ConfigError: A baseline is unknown, or ``uniform`` is asked for without a plan to match.
    """
    require_baselines(baselines, any_plan=bool(plans))
    variants = [Variant("dense", lambda length: None)] if "dense" in baselines else []
    if "uniform" in baselines:
        matched: dict[tuple[tuple[int, ...], ...], tuple[str, Plan]] = {}
        for name, plan in plans.items():
            kept = tuple(kept_tokens(plan, length) for length in lengths)
            matched.setdefault((plan.native_layers, kept), (name, plan))
        for name, plan in matched.values():
            label = "uniform" if len(matched) == 1 else f"uniform like {name}"
            variants.append(Variant(label, partial(uniform_like, plan)))
    taken = {variant.name for variant in variants}
    for name, plan in plans.items():
        variants.append(Variant(f"plan {name}" if name in taken else name, partial(as_it_runs, plan)))
    return variants


def require_baselines(baselines: Sequence[str], *, any_plan: bool) -> None:
    """Check the names of baselines.

    Args:
        baselines: The names.
        any_plan: Whether there is a plan whose memory ``uniform`` can match.

    Raises:
        ConfigError: One is unknown, or ``uniform`` has no plan to match.
    """
    for name in baselines:
        if name not in BASELINES:
            raise ConfigError(f"baseline {name!r} is unknown{nearest(name, BASELINES)}; choose from dense, uniform")
    if "uniform" in baselines and not any_plan:
        raise ConfigError("baseline 'uniform' matches the memory of a plan: give --plan too")


def uniform_like(plan: Plan, length: int) -> Plan:
    """The plan with one constant span for all heads that keeps as many tokens as ``plan`` does at ``length``.

    Native layers stay native.
    """
    return constant_like(plan, kept_tokens(plan, length))


def constant_like(plan: Plan, tokens: int) -> Plan:
    """The plan for the model of ``plan`` in which every head has one constant span; native layers stay native."""
    rule = SpanRule(tokens, 0)
    return Plan.uniform(rule, plan.model, native_layers=plan.native_layers, sink=plan.sink, block=plan.block)


def kept_tokens(plan: Plan, length: int) -> int:
    """Tokens that a head keeps on average, native layers aside."""
    return round(plan.density(length) * length)


def as_it_runs(plan: Plan, length: int) -> Plan:
    """The plan for prompts of ``length`` tokens: one that is anchored at the prompt's end has constant spans there."""
    return plan.anchored_at(length) if plan.anchor == "prompt" else plan


def under(model: Any, plan: Plan | None) -> AbstractContextManager[Any]:
    """The model under a plan for a ``with`` block, or as it is without one."""
    return nullcontext(model) if plan is None else applied(model, plan)


def compare_variants(
    model: Any,
    tokenizer: Any,
    variants: Sequence[Variant],
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    count: int,
    seed: int,
    answers: Answers = "forced",
    depths: Sequence[float] = (),
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Score every variant on the same items.

    Args:
        model: A dense transformers model; left dense at the end.
        tokenizer: Its tokenizer.
        variants: What to compare.
        tasks: Task names.
        lengths: Tokens per item, answer included.
        count: Items per task and length, or per depth where depths are given.
        seed: Of the items.
        answers: How items are answered.
        depths: Where the sought text stands, 0 to 1; by default spread evenly.
        progress: Told after each item the tokens done and in all.

    Returns:
        One row per variant and item (or part of it, such as a slice of a document): ``task``, ``length``, ``variant``,
        ``density``, ``attention_density``, ``metric``, ``answers``, ``item``, ``depth``, ``nll`` (nats per answer
        token, missing where answers are generated), ``score`` (0 to 1).
    """
    rows = []
    kinds, lengths = require_tasks(tasks), list(dict.fromkeys(lengths))  # an item scored twice is no second item
    done, total = 0, len(variants) * sum(lengths) * count * sum(task.places(depths) for task in kinds)

    def report(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done, total)

    for length in lengths:
        for task in kinds:
            samples = task.build(tokenizer, length=length, count=count, seed=seed, depths=depths)
            for variant in variants:
                plan = variant.plan_at(length)
                keys = {"task": task.name, "length": length, "variant": variant.name, **densities(plan, length)}
                for row in measure(model, tokenizer, plan, task, samples, answers=answers, report=report):
                    rows.append({**keys, **row})
    return pd.DataFrame(rows)


def densities(plan: Plan | None, length: int) -> dict[str, float]:
    """What a plan keeps and computes at a length; everything without a plan."""
    return {
        "density": plan.density(length) if plan else 1.0,
        "attention_density": plan.attention_density(length) if plan else 1.0,
    }


def measure(
    model: Any,
    tokenizer: Any,
    plan: Plan | None,
    task: Task,
    samples: Sequence[Sample],
    *,
    answers: Answers,
    report: Callable[[int], None],
) -> list[dict[str, Any]]:
    """What the model makes of the items of one task under one plan.

    Args:
        model: A dense transformers model; left dense at the end.
        tokenizer: Its tokenizer.
        plan: As it runs at the items' length; None for dense attention.
        task: Made the items.
        samples: The items.
        answers: How they are answered.
        report: Told after each item its tokens.

    Returns:
        The columns of `compare_variants` from ``metric`` on, in the order of the items.
    """
    rows = []
    with under(model, plan):
        for item, sample in enumerate(samples):
            for reading in task.measure(model, tokenizer, sample, answers):
                rows.append(
                    {
                        "metric": task.metric_of(task.way(answers)),
                        "answers": task.way(answers),
                        "item": item,
                        "depth": reading.depth,
                        "nll": reading.nll,
                        "score": reading.score,
                    }
                )
            report(sample.target_length)
    return rows
