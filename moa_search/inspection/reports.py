"""An evaluation as one page: what ran, how far each variant carries, scores, differences, plans."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from moa_search.inspection.pages import Page, facts, figure_block, paragraph, table_block
from moa_search.inspection.score_plots import plot_by_length, plot_by_position, plot_depths
from moa_search.inspection.scores import WAYS, signed_interval

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.formats import Plan

__all__ = ["Report", "report_page"]


STYLE = "figure svg { max-width: 44rem; }"
"""Charts are drawn for a phone's width, so that their text can be read there."""


@dataclass(frozen=True)
class Report:
    """What a page is made from.

    Attributes:
        settings: What was asked for, by name.
        items: As `moa_search.evaluation.compare_variants` returns them.
        summary: As `moa_search.evaluation.summarise` returns it.
        differences: As `moa_search.evaluation.paired_differences` returns them.
        effective: As `moa_search.evaluation.effective.effective_table` returns it.
        plans: By the name of their variant.
    """

    settings: Mapping[str, object]
    items: pd.DataFrame
    summary: pd.DataFrame
    differences: pd.DataFrame
    effective: pd.DataFrame
    plans: Mapping[str, Plan]


def report_page(report: Report) -> Page:
    """The page of a report."""
    page = Page("Evaluation of attention plans", subtitle=str(report.settings["model"]), style=STYLE)
    page.add(
        "What ran",
        facts({**report.settings, **_where()}),
        paragraph(
            "All variants answer the same items, from texts that calibration never uses. Means come with 95 % "
            "bootstrap intervals over items; differences are paired, item by item. KV kept is the share of the dense "
            "KV cache at that length."
        ),
    )
    if len(report.effective):
        page.add("Effective context", *_effective(report))
    for task, summary in report.summary.groupby("task", sort=False):
        page.add(f"Scores: {task}", *_task_blocks(report, str(task), summary))
    if len(report.differences):
        page.add("Differences", *_differences(report.differences))
    if report.plans:
        page.add("Plans", _plans(report))
    return page


def _where() -> dict[str, object]:
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version(name)}" for name in ("torch", "transformers")]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": ", ".join(versions),
        "command": " ".join(["moa-eval", *sys.argv[1:]]) if "moa-eval" in sys.argv[0] else "Python",
    }


def _machine() -> str:
    """The GPU, or the processor with the threads that torch takes of it."""
    import torch

    from moa_search.evaluation.machine import device_name

    if torch.cuda.is_available():
        return device_name(torch.device("cuda"))
    return f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"


def _effective(report: Report) -> list[str]:
    from moa_search.evaluation.effective import THRESHOLD

    blocks = [
        paragraph(
            f"The longest tested length at which at least {THRESHOLD:.0%} of the items are answered rightly. The "
            "average span is what a KV head keeps there on average. At equal average span: over the effective context "
            "of one constant window of that many tokens, which is MoA's measure. At equal density: over uniform spans "
            "that keep the same share at every length. Brackets say what the grid of lengths leaves open."
        )
    ]
    for task, rows in report.effective.groupby("task", sort=False):
        shown = rows.assign(
            interval=[f"{low} to {high}" for low, high in zip(rows["low"], rows["high"], strict=True)],
        )
        shown = shown[
            [
                "variant", "n", "effective_context", "interval", "fails_at", "but_not_at", "average_span",
                "window_context", "at_equal_span", "at_equal_span_bracket", "uniform_context", "at_equal_density",
                "at_equal_density_bracket",
            ]
        ]  # fmt: skip
        names = {
            "effective_context": "effective context", "fails_at": "fails at", "average_span": "average span",
            "but_not_at": "but not at",
            "window_context": "of that window", "at_equal_span": "times, equal span",
            "at_equal_span_bracket": "bracket ", "uniform_context": "of uniform",
            "at_equal_density": "times, equal density", "at_equal_density_bracket": "bracket",
        }  # fmt: skip
        times = dict.fromkeys(("times, equal span", "times, equal density"), _two_digits)
        whole = dict.fromkeys(("fails at", "average span", "of that window", "of uniform"), _whole)
        blocks.append(
            table_block(
                shown.rename(columns=names), f"Effective context, {task}, in tokens", formats={**times, **whole}
            )
        )
    return blocks


def _task_blocks(report: Report, task: str, summary: pd.DataFrame) -> list[str]:
    from moa_search.evaluation.effective import THRESHOLD

    metric, way = str(summary["metric"].iloc[0]), WAYS[str(summary["answers"].iloc[0])]
    items = report.items[report.items["task"] == task]
    table = _score_table(summary, f"{task}, answers {way}: means with 95 % intervals")
    threshold = THRESHOLD if task in set(report.effective["task"]) else None
    blocks = [
        figure_block(
            plot_by_length(summary, "score", label=metric, threshold=threshold),
            f"{metric} of each variant against the length of {task} items; the numbers are in the table below",
            caption=f"{task}: {metric}, answers {way}",
        )
    ]
    if summary["nll"].notna().any():
        blocks.append(
            figure_block(
                plot_by_length(summary, "nll", label="nats per answer token"),
                f"Loss of each variant against the length of {task} items; the numbers are in the table below",
                caption=f"{task}: negative log-likelihood of the answer, lower is better",
            )
        )
    blocks.append(table)
    in_parts = items.groupby(["variant", "length", "item"]).size().max() > 1
    if in_parts:
        blocks.append(_by_position(items, task))
    elif items["depth"].nunique() <= 20 and items.groupby(["variant", "length", "depth"]).size().min() > 1:
        blocks.append(_by_depth(items, task))
    return blocks


def _score_table(summary: pd.DataFrame, caption: str) -> str:
    import pandas as pd

    rows = pd.DataFrame(
        {
            "variant": summary["variant"],
            "tokens": summary["length"],
            "KV kept": [f"{share:.1%}" for share in summary["density"]],
            "prefill computed": [f"{share:.1%}" for share in summary["attention_density"]],
            "n": summary["n"],
            "NLL": [_interval(row, "nll") for row in summary.to_dict("records")],
            str(summary["metric"].iloc[0]): [_interval(row, "score") for row in summary.to_dict("records")],
        }
    )
    return table_block(rows, caption)


def _by_position(items: pd.DataFrame, task: str) -> str:
    mean = items.groupby(["variant", "length", "depth"], sort=False)["nll"].mean().reset_index()
    mean["position"] = (mean["depth"] * mean["length"]).round().astype(int)
    shown = mean.pivot_table(index=["length", "position"], columns="variant", values="nll", sort=False).reset_index()
    formats: dict[str, Callable[[Any], str]] = dict.fromkeys(map(str, shown.columns[2:]), _two_digits)
    table = table_block(shown, f"{task}: loss by position, nats per token", formats=formats)
    return figure_block(
        plot_by_position(items),
        f"Loss along the documents of {task}, one panel per length and one line per variant",
        caption="Loss by position in the document; each point is the middle of an eighth",
        table=table,
    )


def _by_depth(items: pd.DataFrame, task: str) -> str:
    mean = items.pivot_table(index=["variant", "depth"], columns="length", values="score", sort=False).reset_index()
    mean["depth"] = [f"{depth:.0%}" for depth in mean["depth"]]
    formats: dict[str, Callable[[Any], str]] = dict.fromkeys(map(str, mean.columns[2:]), _two_digits)
    return figure_block(
        plot_depths(items),
        f"Score of {task} by depth and length, one panel per variant",
        caption="Score by the depth of what is sought and the length of the item",
        table=table_block(mean, f"{task}: score by depth and length", formats=formats),
    )


def _differences(differences: pd.DataFrame) -> list[str]:
    import pandas as pd

    blocks = []
    for against, rows in differences.groupby("against", sort=False):
        records = [row for _, row in rows.iterrows()]
        shown = pd.DataFrame(
            {
                "variant": rows["variant"],
                "task": rows["task"],
                "tokens": rows["length"],
                "n": rows["n"],
                "NLL": [signed_interval(row, "nll_difference") for row in records],
                "score": [signed_interval(row, "score_difference") for row in records],
            }
        )
        blocks.append(table_block(shown, f"Less {against}, the same items", text=["task"]))
    return blocks


def _plans(report: Report) -> str:
    import pandas as pd

    lengths = sorted(report.items["length"].unique())
    rows = []
    for name, plan in report.plans.items():
        origin = plan.provenance
        how = "" if origin is None else " ".join(filter(None, (origin.searcher, origin.criterion)))
        kept = {f"kept at {length}": f"{plan.density(length):.1%}" for length in lengths}
        rows.append({"plan": name, "found by": how, **kept, "fingerprint": plan.fingerprint[:19]})
    return table_block(pd.DataFrame(rows), "Plans and the share of the KV cache that they keep", text=["found by"])


def _interval(row: Mapping[Any, Any], name: str) -> str:
    if row[name] != row[name]:
        return ""
    return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"


def _two_digits(value: Any) -> str:
    return "" if _missing(value) else f"{value:.2f}"


def _whole(value: Any) -> str:
    return "" if _missing(value) else str(int(value))


def _missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))
