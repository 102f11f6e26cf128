"""Held-out scores of plans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import (
    Dtype,
    model_and_tokenizer,
    require_depths,
    require_plans_fit,
    require_positive,
    require_writable,
)
from moa_search.api.variants import given_plans

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.formats import PlanLike

__all__ = ["evaluate_model"]


def evaluate_model(
    model: str | tuple[Any, Any],
    *,
    plan: Sequence[str | PlanLike] = (),
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
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """Score the model dense, under plans and under uniform spans, on held-out items.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo"; in Python also what load_model returned.
        plan: Plan files; in Python also Plans or their contents.
        baselines: dense, and uniform: one span for all heads with as much memory as the plan.
        tasks: passkey, multikey, question, lines and lookup (exact match), copy and tracking (token accuracy),
            perplexity; perplexity:TEXTS and nll:SOURCE over data of yours.
        lengths: Tokens per item, answer included.
        samples: Items per task and length, or per depth where depths are given.
        answers: forced predicts each answer token given those before it and gives the answer's NLL too; generated
            decodes greedily, to the same exact matches.
        depths: Where the sought text stands, such as 0 0.5 1; by default spread evenly.
        output: CSV file for the scores of every item.
        dtype: Type of the weights, as for moa-profile.
        device: Such as cpu or cuda:0; auto takes the first GPU if there is one.
        seed: Of the items.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.

    Returns:
        One row per variant and item; `moa_search.evaluation.summarise` gives means with intervals.

    Raises:
        MoAError: The model, a plan or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.evaluation import compare_variants, make_variants
    from moa_search.formats.files import write_csv
    from moa_search.modeling.support import require_context
    from moa_search.tasks import require_tasks

    require_positive(lengths=min(lengths, default=0), samples=samples)
    require_depths(depths)
    require_tasks(tasks)
    require_writable(output)
    compared = make_variants(given_plans(plan), baselines)
    network, tokenizer = model_and_tokenizer(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    require_plans_fit(compared.plans, network)
    require_context(network.config, max(lengths))
    items = compare_variants(
        network,
        tokenizer,
        compared.variants,
        tasks=tasks,
        lengths=lengths,
        count=samples,
        seed=seed,
        answers=answers,
        depths=depths,
    )
    if output is not None:
        write_csv(items, output)
    return items
