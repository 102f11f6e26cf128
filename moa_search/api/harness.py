"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.api.common import (
    Dtype,
    model_and_tokenizer,
    require_plans_fit,
    require_positive,
    require_writable_folder,
)
from moa_search.api.variants import given_plans
from moa_search.errors import ConfigError
from moa_search.progress import progress

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.evaluation.harness import HarnessRun
    from moa_search.formats import PlanLike

__all__ = ["run_harness"]


def run_harness(
    model: str | tuple[Any, Any],
    *,
    tasks: Sequence[str],
    include_path: str | None = None,
    builtin: bool = False,
    plan: Sequence[str | PlanLike] = (),
    baselines: Sequence[str] = ("dense",),
    length: int | None = None,
    lengths: Sequence[int] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    apply_chat_template: bool = False,
    output: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """Run EleutherAI's lm-evaluation-harness on the model dense and under plans.

    Needs the extra eval: pip install 'moa-search[eval]'. Nothing is fetched from the hub for tasks whose data is local.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo"; in Python also what load_model returned.
        tasks: Names of tasks, groups or tags, or task files.
        include_path: Folder of task files of yours.
        builtin: Whether lm-eval's own tasks can be named too; most of them need the hub.
        plan: Plan files; in Python also Plans or their contents.
        baselines: dense, and uniform: one span for all heads with as much memory as a plan at length.
        length: Tokens at which uniform spans keep as much as a plan, and at which a plan is taken that is anchored at
            the prompt's end.
        lengths: Tokens per item for tasks that make their own data, such as RULER's (their max_seq_lengths).
        limit: Samples per task; all by default.
        num_fewshot: Examples before each question; by default as the task says.
        batch_size: Samples at once.
        apply_chat_template: Whether questions stand within the tokenizer's chat template.
        output: Folder for results.csv, items.csv and every sample's log, samples/VARIANT/TASK.jsonl.
        dtype: Type of the weights, as for moa-profile.
        device: Such as cpu or cuda:0; auto takes the first GPU if there is one.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.

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

    optional = {"limit": limit, "length": length}
    require_positive(batch_size=batch_size, **{name: value for name, value in optional.items() if value is not None})
    require_writable_folder(output)
    compared = make_variants(given_plans(plan), baselines)
    of_a_length = "uniform" in baselines or any(made.anchor == "prompt" for made in compared.plans.values())
    if length is None and of_a_length:
        raise ConfigError("length: uniform spans and plans anchored at the prompt depend on one; give --length")
    network, tokenizer = model_and_tokenizer(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text token, which lm-eval needs; set its eos_token")
    require_plans_fit(compared.plans, network)
    told: dict[str, Any] = {"tokenizer": tokenizer.name_or_path, "pretrained": tokenizer.name_or_path}
    harness = Harness(
        tasks,
        include_path=include_path,
        builtin=builtin,
        metadata=told | ({"max_seq_lengths": list(lengths)} if lengths else {}),
    )
    runs: dict[str, HarnessRun] = {}
    for variant in progress(compared.variants, what="Evaluating", unit="variant"):
        runs[variant.name] = harness.run(
            network,
            tokenizer,
            variant,
            length=length or 0,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
        )
    summary = harness_summary(runs)
    if output is not None:
        items = pd.concat([run.items.assign(variant=name) for name, run in runs.items()])
        _write(Path(output), summary, items, runs)
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
