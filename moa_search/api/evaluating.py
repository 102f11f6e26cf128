"""Held-out scores of plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moa_search.api.common import (
    Dtype,
    Progress,
    model_and_tokenizer,
    named_plans,
    require_positive,
    require_writable,
)

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.formats import Plan

__all__ = ["evaluate_model"]


def evaluate_model(
    model: str | tuple[Any, Any],
    *,
    plan: Sequence[str | Plan] = (),
    baselines: Sequence[str] = ("dense", "uniform"),
    tasks: Sequence[str] = ("passkey", "copy"),
    lengths: Sequence[int] = (1024,),
    samples: int = 10,
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
        tasks: passkey (exact match) and copy (token accuracy); both also give the answer's NLL.
        lengths: Tokens per item, answer included.
        samples: Items per task and length.
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
    from moa_search.architecture import require_context
    from moa_search.errors import ConfigError
    from moa_search.evaluation import compare_variants, make_variants
    from moa_search.evaluation.tasks import require_tasks
    from moa_search.formats import ModelSignature
    from moa_search.formats.files import atomic_write

    require_positive(lengths=min(lengths, default=0), samples=samples)
    require_tasks(tasks)
    require_writable(output)
    plans = named_plans(plan)
    variants = make_variants(plans, baselines, lengths)
    if not variants:
        raise ConfigError("nothing to evaluate: give --plan, or --baselines dense")
    network, tokenizer = model_and_tokenizer(model, dtype=dtype, device=device)
    signature = ModelSignature.of(network.config)
    for name, loaded in plans.items():
        loaded.model.require(signature, f"plan {name}")
    require_context(network.config, max(lengths))
    items = compare_variants(
        network,
        tokenizer,
        variants,
        tasks=tasks,
        lengths=lengths,
        count=samples,
        seed=seed,
        progress=progress,
    )
    if output is not None:
        with atomic_write(output) as file:
            file.write(items.to_csv(index=False).encode())
    return items
