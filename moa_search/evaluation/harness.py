"""EleutherAI's lm-evaluation-harness on a model dense and under plans, with every sample's result kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import pandas as pd

from moa_search.errors import BackendUnavailableError, ConfigError
from moa_search.evaluation.compare import Variant, under
from moa_search.evaluation.statistics import bootstrap_interval
from moa_search.formats.files import nearest, one_line


@dataclass(frozen=True)
class HarnessRun:
    """What the harness found under one variant.

    Attributes:
        totals: One row per task, filter and metric: the harness's own ``value`` with its ``stderr``.
        items: The same per sample, ``item`` being the harness's ``doc_id``.
        logs: By task, what the harness logs of every sample, as JSON values.
    """

    totals: pd.DataFrame
    items: pd.DataFrame
    logs: dict[str, list[dict[str, Any]]]


class Harness:
    """Tasks of the harness, loaded once.

    Args:
        tasks: Names of tasks, groups or tags, or YAML files.
        include_path: Folder of task files.
        builtin: Whether the harness's own tasks can be named too; most of them need the hub.
        metadata: Told to tasks that make their own data, such as RULER's.

    Raises:
        BackendUnavailableError: The harness isn't installed.
        ConfigError: A task is unknown or can't be loaded.
    """

    def __init__(
        self, tasks: Sequence[str], *, include_path: str | None, builtin: bool, metadata: dict[str, Any]
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise BackendUnavailableError(
                "lm-evaluation-harness isn't installed: pip install 'moa-search[eval]'"
            ) from error
        with _quiet():
            self._manager = TaskManager(include_path=include_path, include_defaults=builtin, metadata=metadata)
        known = self._manager.all_tasks
        if not tasks:
            raise ConfigError(f"no task is named; choose from {', '.join(known[:20])}")
        for name in tasks:
            if name not in known and not name.endswith((".yaml", ".yml")):
                where = " among lm-eval's own and yours" if builtin else "; its own tasks need --builtin true"
                raise ConfigError(f"lm-eval knows no task {one_line(name)!r}{nearest(name, known)}{where}")
        self._tasks = list(tasks)

    def run(self, model: Any, tokenizer: Any, variant: Variant, *, length: int, **options: Any) -> HarnessRun:
        """Run the tasks under one variant.

        Args:
            model: A dense transformers model; left dense.
            tokenizer: Its tokenizer.
            variant: How to run the model.
            length: Length in tokens that a variant's plan is taken for, where it depends on one.
            **options: Further arguments of the harness's ``simple_evaluate``.

        Raises:
            ConfigError: The harness can't run a task; the message is its own.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with under(model, variant.plan_at(length)), _quiet():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.pop("batch_size", 1))
            try:
                found = simple_evaluate(
                    model=wrapped, tasks=self._tasks, task_manager=self._manager, log_samples=True, **options
                )
            except (ValueError, KeyError, FileNotFoundError, ConnectionError, AssertionError) as error:
                raise ConfigError(f"lm-eval can't run {', '.join(self._tasks)}: {one_line(error)}") from error
        return HarnessRun(
            pd.DataFrame(_totals(found["results"]), columns=["task", "filter", "metric", "value", "stderr"]),
            pd.DataFrame(_items(found["samples"]), columns=["task", "filter", "metric", "item", "value"]),
            found["samples"],
        )


def harness_summary(runs: dict[str, HarnessRun], against: str = "dense") -> pd.DataFrame:
    """One row per variant, task, filter and metric.

    Args:
        runs: By the name of the variant.
        against: Variant that the others are compared with, sample by sample, where it is among them.

    Returns:
        The harness's ``value`` and ``stderr``, ``n`` samples, and where a metric is a number for each sample the mean
        ``difference`` from ``against`` with ``difference_low`` and ``difference_high``, paired.
    """
    rows = []
    base = runs[against].items.set_index(["task", "filter", "metric", "item"])["value"] if against in runs else None
    for name, run in runs.items():
        grouped = dict(list(run.items.groupby(["task", "filter", "metric"], sort=False)))
        for total in run.totals.to_dict("records"):
            key = (total["task"], total["filter"], total["metric"])
            row = {"variant": name, **total}
            mine = grouped.get(key)
            if mine is not None:
                row["n"] = len(mine)
                if base is not None and name != against:
                    values = mine.set_index(["task", "filter", "metric", "item"])["value"]
                    difference = (values - base.reindex(values.index)).dropna()
                    row["difference"] = difference.mean()
                    row["difference_low"], row["difference_high"] = bootstrap_interval(difference)
            rows.append(row)
    columns = ["variant", "task", "filter", "metric", "n", "value", "stderr"]
    return pd.DataFrame(rows, columns=[*columns, "difference", "difference_low", "difference_high"])


def _totals(results: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task, values in results.items():
        for name, value in values.items():
            metric, comma, chosen = name.partition(",")
            if comma and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{chosen}")
                error = error if _is_number(error) else None  # "N/A" where the harness has none
                yield {"task": task, "filter": chosen, "metric": metric, "value": value, "stderr": error}


def _items(samples: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    for task, logged in samples.items():
        for sample in logged:
            for metric in sample["metrics"]:
                if _is_number(sample[metric]):  # perplexities are pairs, for corpora as a whole
                    key = {"task": task, "filter": sample["filter"], "metric": metric, "item": sample["doc_id"]}
                    yield {**key, "value": float(sample[metric])}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own log of every step would hide the result; its errors stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
