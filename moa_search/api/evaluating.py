"""Held-out scores of plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moa_search.api.common import model_and_tokenizer, require_plans_fit, require_writable
from moa_search.api.variants import given_plans
from moa_search.options import EvalOptions, takes

if TYPE_CHECKING:
    import pandas as pd


@takes(EvalOptions)
def evaluate_model(model: str | tuple[Any, Any], options: EvalOptions) -> pd.DataFrame:
    """Score the model dense, under plans and under uniform spans, on held-out items.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo".
        options: As keywords, each described in `EvalOptions`.

    Returns:
        One row per variant and item; `moa_search.evaluation.summarise` gives means with intervals.

    Raises:
        MoAError: The model, a plan or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.evaluation import compare_variants, make_variants
    from moa_search.formats.files import write_csv
    from moa_search.modeling.support import require_context
    from moa_search.tasks import require_tasks

    require_tasks(options.tasks)
    require_writable(options.output)
    compared = make_variants(given_plans(options.plan), options.baselines)
    network, tokenizer = model_and_tokenizer(model, **options.loading)
    require_plans_fit(compared.plans, network)
    require_context(network.config, max(options.lengths))
    items = compare_variants(
        network,
        tokenizer,
        compared.variants,
        tasks=options.tasks,
        lengths=options.lengths,
        count=options.samples,
        seed=options.seed,
        answers=options.answers,
        depths=options.depths,
    )
    if options.output is not None:
        write_csv(items, options.output)
    return items
