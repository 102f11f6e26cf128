"""An evaluation as one page: what ran, how far each variant carries, scores, differences, plans."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from moa_search.inspection.frames.scores import (
    ANSWERED,
    compared_plans_frame,
    depth_frame,
    difference_frame,
    effective_frame,
    length_frame,
    position_frame,
    score_frame,
)
from moa_search.inspection.pages.page import Page, facts, figure_block, paragraph
from moa_search.inspection.printing import to_html, to_markdown
from moa_search.inspection.score_plots import plot_by_length, plot_by_position, plot_depths

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.formats import Plan


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

    @property
    def retrieval(self) -> list[str]:
        """Names of the tasks that have an effective context."""
        return list(dict.fromkeys(self.effective["task"]))

    @property
    def lengths(self) -> list[int]:
        """Tokens per item, increasing."""
        return sorted(self.items["length"].unique().tolist())

    @property
    def against(self) -> list[str]:
        """Variants that others are compared with."""
        return list(dict.fromkeys(self.differences["against"]))


def report_page(report: Report) -> Page:
    """The page of a report."""
    page = Page(
        "Evaluation of attention plans", subtitle=str(report.settings["model"]), styles=("page.css", "report.css")
    )
    page.add(
        "What ran",
        facts({**report.settings, **_where()}),
        paragraph(
            "All variants answer the same items, from texts that calibration never uses. Means come with 95 % "
            "bootstrap intervals over items; differences are paired, item by item. Tokens kept is the share "
            "that attention still reads, bytes kept that of a dense 16-bit cache's bytes that are held once the prompt "
            "was read; at peak, those held while it is, one layer's own keys and values among them; extra passes, how "
            "often the prompt is read beside the first time. What only masks keys frees no bytes."
        ),
    )
    if len(report.effective):
        page.add("Effective context", *_effective(report))
    for task, summary in report.summary.groupby("task", sort=False):
        page.add(f"Scores: {task}", *_task_blocks(report, str(task), summary))
    if len(report.differences):
        page.add("Differences", *(to_html(difference_frame(report.differences, name)) for name in report.against))
    if report.plans:
        page.add("Plans", to_html(compared_plans_frame(report.plans, report.lengths)))
    return page


def report_markdown(report: Report) -> str:
    """The tables of a report for a document: effective contexts, scores by length, and differences."""
    tables = [effective_frame(report.effective, task) for task in report.retrieval]
    tables += [length_frame(rows) for _, rows in report.summary.groupby("task", sort=False)]
    tables += [difference_frame(report.differences, name) for name in report.against]
    return "\n".join(map(to_markdown, tables))


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
    return blocks + [to_html(effective_frame(report.effective, task)) for task in report.retrieval]


def _task_blocks(report: Report, task: str, summary: pd.DataFrame) -> list[str]:
    from moa_search.evaluation.effective import THRESHOLD

    metric, answered = str(summary["metric"].iloc[0]), ANSWERED[str(summary["answers"].iloc[0])]
    items = report.items[report.items["task"] == task]
    table = score_frame(summary, f"{task}, answers {answered}: means with 95 % intervals")
    threshold = THRESHOLD if task in report.retrieval else None
    blocks = [
        figure_block(
            plot_by_length(summary, "score", label=metric, threshold=threshold),
            f"{metric} of each variant against the length of {task} items; the numbers are in the table below",
            caption=f"{task}: {metric}, answers {answered}",
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
    blocks.append(to_html(table))
    in_parts = items.groupby(["variant", "length", "item"]).size().max() > 1
    if in_parts and task.startswith("perplexity"):
        blocks.append(_by_position(items, task))
    elif (
        not in_parts
        and items["depth"].nunique() <= 20
        and items.groupby(["variant", "length", "depth"]).size().min() > 1
    ):
        blocks.append(_by_depth(items, task))
    return blocks


def _by_position(items: pd.DataFrame, task: str) -> str:
    return figure_block(
        plot_by_position(items),
        f"Loss along the documents of {task}, one panel per length and one line per variant",
        caption="Loss by position in the document; each point is the middle of an eighth",
        table=position_frame(items, task),
    )


def _by_depth(items: pd.DataFrame, task: str) -> str:
    return figure_block(
        plot_depths(items),
        f"Score of {task} by depth and length, one panel per variant",
        caption="Score by the depth of what is sought and the length of the item",
        table=depth_frame(items, task),
    )
