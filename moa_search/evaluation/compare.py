"""Score variants of one model (dense, plans, uniform spans) on the same held-out items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pandas as pd

from moa_search.data import Sample
from moa_search.errors import ConfigError
from moa_search.evaluation.loss_cache import DENSE_PLAN
from moa_search.evaluation.scoring import score_item
from moa_search.formats.files import nearest
from moa_search.formats.plan import Plan
from moa_search.progress import progress
from moa_search.runtime import applied
from moa_search.spans import SpanRule
from moa_search.tasks import AnswerMode, Task, require_tasks

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

    def key(self, length: int) -> str:
        """What tells it from other ways to run the model at a length in tokens: the same for ways that do the same."""
        plan = self.plan_at(length)
        return DENSE_PLAN if plan is None else plan.fingerprint

    def running(self, model: Any, length: int) -> AbstractContextManager[Any]:
        """The model run so at a length, for a ``with`` block."""
        return under(model, self.plan_at(length))

    def costs(self, length: int) -> dict[str, float]:
        """What it keeps, computes and holds at a length, as columns of `compare_variants`."""
        plan = self.plan_at(length)
        if plan is None:
            return {**densities(None, length), **held(1, 1)}
        return {**densities(plan, length), **held(plan.share(length), len(plan.patterns) - len(plan.native_layers))}


@dataclass(frozen=True)
class Comparison:
    """What is measured side by side.

    Attributes:
        variants: Baselines and plans, in the order of the tables.
        plans: Plans by the name of their variant.
        uniform: For a plan's variant, the uniform one that keeps as much.
        pairs: Names of two variants that differ in nothing but how spans were found.
    """

    variants: list[Variant]
    plans: dict[str, Plan]
    uniform: dict[str, str]
    pairs: list[tuple[str, str]]


def make_variants(groups: Iterable[Mapping[str, Plan]], baselines: Sequence[str]) -> Comparison:
    """Dense attention, then of each group uniform spans and the plans.

    A name depends on nothing but the plan, so that tables of different runs and commands can be joined: dense attention
    is ``dense``, and the spans that keep as much as the plan ``NAME`` are ``uniform like NAME``.

    Args:
        groups: Plans by name. Those of one group were made for the same budget: they share one uniform baseline, which
            keeps as much as the first, and the first is compared with each of the others.
        baselines: Some of `BASELINES`.

    Raises:
        ConfigError: A baseline is unknown, ``uniform`` is asked for without a plan to match, or there is nothing to
            evaluate.
    """
    groups = list(groups)
    require_baselines(baselines, any_plan=bool(groups))
    found = Comparison([], {}, {}, [])
    if "dense" in baselines:
        found.variants.append(Variant("dense", lambda length: None))
    for plans in groups:
        first, *others = plans
        if "uniform" in baselines:
            uniform = uniform_name(first)
            found.variants.append(Variant(uniform, partial(uniform_like, plans[first])))
            found.uniform.update(dict.fromkeys(plans, uniform))
            found.pairs.append((first, uniform))
        found.pairs.extend((first, other) for other in others)
        found.variants.extend(Variant(name, plan.resolve) for name, plan in plans.items())
        found.plans.update(plans)
    if not found.variants:
        raise ConfigError("nothing to evaluate: give --plan, or --baselines dense")
    return found


def uniform_name(plan_name: str) -> str:
    """The name of the uniform spans that keep as much as a plan."""
    return f"uniform like {plan_name}"


def is_baseline_name(name: str) -> bool:
    """Whether a baseline has that name, or may have it, so that no plan should."""
    return name in BASELINES or name.startswith(uniform_name(""))


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
            raise ConfigError(
                f"baseline {name!r} is unknown{nearest(name, BASELINES)}; choose from dense, uniform, or none alone"
            )
    if "uniform" in baselines and not any_plan:
        raise ConfigError("baseline 'uniform' matches the memory of a plan: give --plan too")


def uniform_like(plan: Plan, length: int) -> Plan:
    """The plan with one constant span for all heads, in 16 bits, that takes as many bytes as ``plan`` at ``length``.

    Native layers stay native.
    """
    return constant_like(plan, round(plan.share(length) * length))


def constant_like(plan: Plan, tokens: int) -> Plan:
    """The plan for the model of ``plan`` in which every head has one constant span; native layers stay native."""
    rule = SpanRule(tokens, 0)
    return Plan.uniform(rule, plan.model, native_layers=plan.native_layers, sink=plan.sink, block=plan.block)


def kept_tokens(plan: Plan, length: int) -> int:
    """Tokens that a head keeps on average, native layers aside."""
    return round(plan.density(length) * length)


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
    answers: AnswerMode = "forced",
    depths: Sequence[float] = (),
) -> pd.DataFrame:
    """Score every variant on the same items.

    Args:
        model: A dense transformers model; left dense at the end.
        tokenizer: Its tokenizer.
        variants: What to compare.
        tasks: Task names.
        lengths: Tokens per item, answer included.
        count: Items per task and length, or per depth where depths are given.
        seed: Random seed for drawing items.
        answers: How items are answered.
        depths: Where the sought text stands, 0 to 1; by default spread evenly.

    Returns:
        One row per variant and item (or part of it, such as a slice of a document): ``task``, ``length``, ``variant``,
        ``density``, ``attention_density``, ``kv_share``, ``kv_peak`` and ``extra_passes`` (see `held`), ``metric``,
        ``answers``, ``item``, ``depth``, ``nll`` (nats per answer
        token, missing where answers are generated), ``score`` (0 to 1).
    """
    rows = []
    kinds, lengths = require_tasks(tasks), list(dict.fromkeys(lengths))  # an item scored twice is no second item
    total = len(variants) * sum(lengths) * count * sum(task.places(depths) for task in kinds)
    with progress(what="Evaluating", unit="token", total=total) as bar:
        for length in lengths:
            for task in kinds:
                samples = task.held_out(tokenizer, length=length, count=count, seed=seed, depths=depths)
                measured: dict[str, list[dict[str, Any]]] = {}  # by what it does: uniform spans may be the same
                for variant in variants:
                    does = variant.key(length)
                    if does in measured:
                        bar.update(sum(sample.target_length for sample in samples))
                    else:
                        with variant.running(model, length):
                            measured[does] = measure(model, task, samples, answers=answers, report=bar.update)
                    keys = {"task": task.name, "length": length, "variant": variant.name, **variant.costs(length)}
                    rows += [{**keys, **row} for row in measured[does]]
    return pd.DataFrame(rows)


def densities(plan: Plan | None, length: int) -> dict[str, float]:
    """What a plan keeps and computes at a length; everything without a plan."""
    return {
        "density": plan.density(length) if plan else 1.0,
        "attention_density": plan.attention_density(length) if plan else 1.0,
    }


def held(share: float, layers: int) -> dict[str, float]:
    """Bytes that a cache takes, and passes over the prompt beside the first, as columns.

    Args:
        share: Bytes of keys and values after the prompt was read, over those of a dense 16-bit cache.
        layers: That are read one after the other. While one is, all of its keys and values are there in 16 bits, those
            of layers before it as they will be held.
    """
    return {"kv_share": share, "kv_peak": share + (1 - share) / layers, "extra_passes": 0.0}


def measure(
    model: Any,
    task: Task,
    samples: Sequence[Sample],
    *,
    answers: AnswerMode,
    report: Callable[[int], None],
) -> list[dict[str, Any]]:
    """What the model makes of the items of one task.

    Args:
        model: A transformers model, run as a variant runs it.
        task: Made the items.
        samples: The items.
        answers: How they are answered.
        report: Told after each item its tokens.

    Returns:
        The columns of `compare_variants` from ``metric`` on, in the order of the items.
    """
    rows, mode = [], task.answer_mode(answers)
    metric = task.metric_of(mode)
    for item, sample in enumerate(samples):
        for score in score_item(model, task, sample, answers):
            rows.append({"metric": metric, "answers": mode, "item": item, **asdict(score)})
        report(sample.target_length)
    return rows
