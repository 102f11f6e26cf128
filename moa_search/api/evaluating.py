"""Held-out scores of plans."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import (
    Dtype,
    Progress,
    model_and_tokenizer,
    require_depths,
    require_plans_fit,
    require_positive,
    require_writable,
)

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.formats import Plan

__all__ = ["evaluate_model", "named_plans", "plan_name"]


def evaluate_model(
    model: str | tuple[Any, Any],
    *,
    plan: Sequence[str | Plan] = (),
    baselines: Sequence[str] = ("dense", "uniform"),
    tasks: Sequence[str] = ("passkey", "copy"),
    lengths: Sequence[int] = (1024,),
    samples: int = 10,
    answers: Literal["forced", "generated"] = "forced",
    depths: Sequence[float] = (),
    output: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Score the model dense, under plans and under uniform spans, on held-out items.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo"; in Python also what load_model returned.
        plan: Plan files; in Python also Plans.
        baselines: dense, and uniform: one span for all heads with as much memory as the plan.
        tasks: passkey, multikey, lines and lookup (exact match), copy and tracking (token accuracy), perplexity;
            perplexity:TEXTS, nll:SOURCE and longbench:FILE.jsonl over data of yours.
        lengths: Tokens per item, answer included.
        samples: Items per task and length, or per depth where depths are given.
        answers: forced predicts each answer token given those before it and gives the answer's NLL too; generated
            decodes greedily, to the same exact matches.
        depths: Where the sought text stands, such as 0 0.5 1; by default spread evenly.
        output: CSV file for the scores of every item.
        dtype: Type of the weights, as for moa-profile.
        device: Such as cpu or cuda:0; auto takes the first GPU if there is one.
        seed: Of the items.
        progress: Told the tokens done and in all.

    Returns:
        One row per variant and item; `moa_search.evaluation.summarise` gives means with intervals.

    Raises:
        MoAError: The model, a plan or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.errors import ConfigError
    from moa_search.evaluation import compare_variants, make_variants
    from moa_search.evaluation.tasks import require_tasks
    from moa_search.formats.files import write_csv
    from moa_search.modeling.support import require_context

    require_positive(lengths=min(lengths, default=0), samples=samples)
    require_depths(depths)
    require_tasks(tasks)
    require_writable(output)
    plans = named_plans(plan)
    variants = make_variants(plans, baselines, lengths)
    if not variants:
        raise ConfigError("nothing to evaluate: give --plan, or --baselines dense")
    network, tokenizer = model_and_tokenizer(model, dtype=dtype, device=device)
    require_plans_fit(plans, network)
    require_context(network.config, max(lengths))
    items = compare_variants(
        network,
        tokenizer,
        variants,
        tasks=tasks,
        lengths=lengths,
        count=samples,
        seed=seed,
        answers=answers,
        depths=depths,
        progress=progress,
    )
    if output is not None:
        write_csv(items, output)
    return items


def named_plans(plan: Sequence[str | Plan]) -> dict[str, Plan]:
    """Plans, loaded where a file is given, by the shortest names that tell them apart."""
    from moa_search.formats import Plan

    plans: dict[str, Plan] = {}
    for index, entry in enumerate(plan):
        loaded = entry if isinstance(entry, Plan) else Plan.load(entry)
        plans[plan_name(entry, loaded, index, plans)] = loaded
    return plans


def plan_name(entry: Any, plan: Plan, index: int, taken: dict[str, Plan]) -> str:
    """The shortest name that tells a plan from those before: its file's, its folder's, else a number."""
    candidates = [f"plan {index + 1}"]
    if isinstance(entry, str | os.PathLike):
        path = Path(entry)
        candidates = [path.stem, f"{path.parent.name}/{path.stem}", str(path)]
        if path.stem == "plan":  # moa-search names every chosen plan so; its folder says which
            candidates.insert(0, path.absolute().parent.name)
    elif plan.provenance is not None and plan.provenance.criterion:
        candidates.insert(0, plan.provenance.criterion)
    return next((name for name in candidates if name not in taken), f"plan {index + 1}")
