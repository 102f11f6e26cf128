"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.api.common import model_and_tokenizer, require_plans_fit, require_writable_folder
from moa_search.api.variants import given_plans
from moa_search.errors import ConfigError
from moa_search.options import HarnessOptions, takes
from moa_search.progress import progress

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.evaluation.harness import HarnessRun


@takes(HarnessOptions)
def run_harness(model: str | tuple[Any, Any], options: HarnessOptions) -> pd.DataFrame:
    """Run EleutherAI's lm-evaluation-harness on the model dense and under plans.

    Needs the extra eval: pip install 'moa-search[eval]'. Nothing is fetched from the hub for tasks whose data is local.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo".
        options: As keywords, each described in `HarnessOptions`.

    Returns:
        One row per variant, task and metric: the harness's value and standard error, and its difference from dense on
        the same samples with a 95 % bootstrap interval.

    Raises:
        MoAError: lm-eval isn't installed, or the model, a plan, a task or an option can't be used; see
            `moa_search.errors`.
    """
    import pandas as pd

    from moa_search.evaluation.compare import make_variants
    from moa_search.evaluation.harness import Harness, harness_summary

    require_writable_folder(options.output)
    compared = make_variants(given_plans(options.plan), options.baselines)
    of_a_length = "uniform" in options.baselines or any(made.anchor == "prompt" for made in compared.plans.values())
    if options.length is None and of_a_length:
        raise ConfigError("length: uniform spans and plans anchored at the prompt depend on one; give --length")
    network, tokenizer = model_and_tokenizer(model, **options.loading)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token, which lm-eval needs; set its eos_token")
    require_plans_fit(compared.plans, network)
    told: dict[str, Any] = {"tokenizer": tokenizer.name_or_path, "pretrained": tokenizer.name_or_path}
    harness = Harness(
        options.tasks,
        include_path=options.include_path,
        builtin=options.builtin,
        metadata=told | ({"max_seq_lengths": list(options.lengths)} if options.lengths else {}),
    )
    runs: dict[str, HarnessRun] = {}
    for variant in progress(compared.variants, what="Evaluating", unit="variant"):
        runs[variant.name] = harness.run(
            network,
            tokenizer,
            variant,
            length=options.length or 0,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            apply_chat_template=options.apply_chat_template,
        )
    summary = harness_summary(runs)
    if options.output is not None:
        items = pd.concat([run.items.assign(variant=name) for name, run in runs.items()])
        _write(Path(options.output), summary, items, runs)
    return summary


def _write(output: Path, summary: pd.DataFrame, items: pd.DataFrame, runs: dict[str, HarnessRun]) -> None:
    from moa_search.formats.files import atomic_write, write_csv

    for name, table in (("results", summary), ("items", items[["variant", *items.columns.drop("variant")]])):
        write_csv(table, output / f"{name}.csv")
    for variant, run in runs.items():
        folder = output / "samples" / re.sub(r"[^\w.@ -]", "_", variant)
        for task, logged in run.logs.items():
            with atomic_write(folder / f"{task}.jsonl") as file:
                for sample in logged:
                    file.write(json.dumps(sample, default=str, ensure_ascii=False).encode() + b"\n")
