"""The tables of docs/results-rivals.md and docs/results-effective-context.md, from docs/data: ``python tables.py``.

Each stands between ``<!-- table NAME -->`` and ``<!-- end -->`` in its page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from cells import BY_TORCH

from moa_search.evaluation.effective import effective_context
from moa_search.evaluation.statistics import bootstrap_interval

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "data"
PAGES = [ROOT / "docs" / f"results-{name}.md" for name in ("rivals", "rivals-tables", "effective-context")]
TASKS = ("passkey", "copy", "multikey")
LENGTHS = (1024, 2048, 4096, 8192)
ENOUGH = 4
BYTES_PER_TOKEN = 2 * 2 * 3 * 64 * 30
"""Of a dense 16-bit cache: keys and values of 3 heads of width 64 in 30 layers."""

NAMES = {
    "quarter-bytes": "**spans and bits, 25 %**",
    "eighth-bytes": "**spans and bits, 12.5 %**",
    "sixteenth-bytes": "**spans and bits, 6.25 %**",
    "half": "spans alone, 50 %",
    "quarter": "spans alone, 25 %",
    "eighth": "spans alone, 12.5 %",
    "eighth-tuned": "spans alone, 12.5 %, tuned",
    "uniform like half": "uniform window, 50 %",
    "uniform like quarter": "uniform window, 25 %",
    "uniform like eighth": "uniform window, 12.5 %",
    "moa-0.5": "MoA's search, 50 %",
    "moa-0.25": "MoA's search, 25 %",
    "moa-0.125": "MoA's search, 12.5 %",
}
CACHES = ("int8", "int4", "int4-plain", "quantized-cache-4", "quantized-cache-2")
METHODS = (
    *("kvzip", "kvzip-layer", "kvzip-head", "duo-attention", "adakv+compactor", "compactor"),
    *("adakv+expected-attention", "expected-attention", "adakv+snapkv", "snapkv", "tova", "keydiff", "streaming-llm"),
)
GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("", "unknown", ("dense",)),
    ("a cache in fewer bits", "unknown", CACHES),
    ("plans of this project", "unknown", ("quarter-bytes", "eighth-bytes", "sixteenth-bytes")),
    ("the same in 16 bits", "unknown", ("half", "quarter", "eighth", "eighth-tuned")),
    ("spans alike for all heads, and MoA's", "unknown", tuple(name for name in NAMES if name[:3] in ("uni", "moa"))),
    *(
        (f"kvpress, question {question}, {words} of the tokens", question, tuple(f"{one}@{share}" for one in METHODS))
        for question in ("unknown", "known")
        for share, words in (("0.25", "a quarter"), ("0.125", "an eighth"), ("0.0625", "a sixteenth"))
    ),
)
PAIRS = (
    *(("quarter-bytes", other) for other in ("kvzip@0.25", "kvzip-head@0.25", "duo-attention@0.25", "int4")),
    *(("quarter-bytes", other) for other in ("quantized-cache-4", "adakv+compactor@0.25", "quarter")),
    *(("eighth-bytes", other) for other in ("kvzip@0.125", "kvzip-head@0.125", "duo-attention@0.125", "int4")),
    *(("eighth-bytes", other) for other in ("adakv+compactor@0.125", "eighth-tuned")),
    *(("sixteenth-bytes", other) for other in ("kvzip@0.0625", "quantized-cache-2")),
    *(("quarter", other) for other in ("kvzip@0.25", "int4", "duo-attention@0.25", "adakv+compactor@0.25")),
    *(("quarter", other) for other in ("snapkv@0.25", "moa-0.25", "uniform like quarter")),
    ("eighth-tuned", "kvzip@0.125"),
)


class Items:
    """All readings, an item's turns as one, and what variants hold."""

    def __init__(self, folder: Path = DATA) -> None:
        every = pd.read_csv(folder / "rivals-smollm2-135m.csv.gz")
        keys = ["answers", "task", "length", "variant", "question", "item"]
        every = every[~every.variant.str.endswith(BY_TORCH)]  # they check kernels, on few items
        self.all = every.groupby(keys, sort=False)[["nll", "score"]].mean().reset_index()
        costs = pd.read_csv(folder / "rivals-costs-smollm2-135m.csv")
        self.costs = costs.set_index(["variant", "question", "length"]).sort_index()
        self._cells: dict[tuple[str, str, int, tuple[str, ...]], dict[tuple[str, str], pd.DataFrame]] = {}

    def cell(
        self, task: str, length: int, answers: str = "forced", *, of: tuple[str, ...] = ()
    ) -> dict[tuple[str, str], pd.DataFrame]:
        """By variant and question, rows of the same items for all that answered at least `ENOUGH` or all of them.

        Args:
            task: Its name.
            length: In tokens.
            answers: ``forced`` or ``generated``.
            of: Some variants, which may have more items in common than all.
        """
        key = (answers, task, length, of)
        if key not in self._cells:
            rows = self.all[(self.all.answers == answers) & (self.all.task == task) & (self.all.length == length)]
            rows = rows[rows.variant.isin(of)] if of else rows
            found = {name: part.set_index("item") for name, part in rows.groupby(["variant", "question"], sort=False)}
            most = max(map(len, found.values()), default=0)
            found = {name: part for name, part in found.items() if len(part) >= min(most, ENOUGH)}
            common = sorted(set.intersection(*(set(part.index) for part in found.values()))) if found else []
            self._cells[key] = {name: part.loc[common] for name, part in found.items()} if common else {}
        return self._cells[key]

    def cost(self, variant: str, question: str, length: int) -> pd.Series:
        """Tokens read, bytes held and at the peak, extra passes."""
        return self.costs.loc[(variant, question, length)]


def name_of(variant: str, question: str = "unknown") -> str:
    """What a table calls a variant."""
    return NAMES.get(variant, variant) if question == "unknown" else f"{variant}, question known"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def means(part: pd.DataFrame, *, interval: bool = True) -> str:
    """NLL with its interval, and the score."""
    low, high = bootstrap_interval(part.nll)
    between = f" [{low:.2f}, {high:.2f}]" if interval else ""
    return f"{part.nll.mean():.2f}{between} / {part.score.mean():.2f}"


def costs_of(items: Items, variant: str, question: str, length: int) -> list[str]:
    """The columns of what a variant holds."""
    cost = items.cost(variant, question, length)
    shares = [f"{100 * cost[column]:.{digits}f}%" for column, digits in (("tokens_read", 0), ("held", 1), ("peak", 0))]
    return [*shares, f"{cost.extra_passes:.1f}".removesuffix(".0")]


def at_length(items: Items, length: int, of: tuple[str, ...] = ()) -> str:
    """Every variant at a length."""
    cells = {task: items.cell(task, length, of=of) for task in TASKS}
    counts = [f"{task}, n = {len(next(iter(cell.values()), []))}" for task, cell in cells.items()]
    rows = []
    for title, question, variants in GROUPS:
        of_group = []
        for variant in variants:
            found = [cell.get((variant, question)) for cell in cells.values()]
            if any(part is not None for part in found):
                shown = ["-" if part is None else means(part) for part in found]
                of_group.append([name_of(variant), *costs_of(items, variant, question, length), *shown])
        if of_group and title:
            rows.append([f"*{title}*", *[""] * (4 + len(TASKS))])
        rows += of_group
    return table([f"{length} tokens", "tokens read", "bytes held", "at peak", "extra passes", *counts], rows)


def excess(
    items: Items,
    variant: str,
    question: str,
    lengths: Sequence[int],
    tasks: Sequence[str] = TASKS,
    of: tuple[str, ...] = (),
) -> np.ndarray | None:
    """NLL less dense attention's of every item of some lengths and tasks."""
    parts = []
    for length in lengths:
        for task in tasks:
            cell = items.cell(task, length, of=of)
            if (variant, question) not in cell or ("dense", "unknown") not in cell:
                return None
            parts.append((cell[variant, question].nll - cell["dense", "unknown"].nll).to_numpy())
    return np.concatenate(parts)


def signed(values: np.ndarray, digits: int = 2) -> str:
    """A mean difference with its interval."""
    low, high = bootstrap_interval(values)
    return f"{values.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _columns(items: Items, of: tuple[str, ...] = ()) -> dict[str, list[int]]:
    """Lengths that were measured, and all of them, by what stands above the column."""
    lengths = [length for length in LENGTHS if excess(items, "quarter-bytes", "unknown", [length], of=of) is not None]
    groups = {str(length): [length] for length in lengths} | {"all": lengths}
    found = {}
    for name, group in groups.items():
        values = excess(items, "quarter-bytes", "unknown", group, of=of)
        assert values is not None
        found[f"{name}, n = {len(values)}"] = group
    return found


def over_lengths(items: Items, of: tuple[str, ...] = ()) -> str:
    """NLL less dense attention's on equal items, by length."""
    columns = _columns(items, of)
    rows = []
    for title, question, variants in GROUPS[1:]:
        of_group = []
        for variant in variants:
            found = [excess(items, variant, question, group, of=of) for group in columns.values()]
            if any(one is not None for one in found):
                length = next(group[0] for group, one in zip(columns.values(), found, strict=True) if one is not None)
                cost = items.cost(variant, question, length)
                shown = ["-" if one is None else signed(one) for one in found]
                shares = [f"{100 * cost.tokens_read:.0f}%", f"{100 * cost.held:.1f}%"]
                of_group.append([name_of(variant), *shares, *shown])
        if of_group:
            rows += [[f"*{title}*", *[""] * (2 + len(columns))], *of_group]
    return table(["NLL less dense attention's", "tokens read", "bytes held", *columns], rows)


def pairs(items: Items) -> str:
    """Paired differences on equal items, by length."""
    columns = _columns(items)
    rows = []
    for mine, other in PAIRS:
        row = [name_of(mine), name_of(other)]
        for group in columns.values():
            both = [excess(items, one, "unknown", group) for one in (mine, other)]
            row.append("-" if any(one is None for one in both) else signed(both[0] - both[1]))
        if set(row[2:]) != {"-"}:
            rows.append(row)
    return table(["NLL of", "less", *columns], rows)


def pairs_by_task(items: Items) -> str:
    """The same by task, over all lengths."""
    rows = []
    for mine, other in PAIRS:
        found = [[excess(items, one, "unknown", LENGTHS, [task]) for one in (mine, other)] for task in TASKS]
        shown = ["-" if any(one is None for one in both) else signed(both[0] - both[1]) for both in found]
        if set(shown) != {"-"}:
            rows.append([name_of(mine), name_of(other), *shown])
    return table(["NLL of, all lengths", "less", *TASKS], rows)


OURS = ("dense", "int8", "int4", "int4-plain", *NAMES)
REACH = ("dense", "int8", "int4", "int4-plain", *NAMES)


def reach(items: Items) -> str:
    """How far passkeys are found, by bytes per token of context."""
    lengths = sorted({length for length in items.all[items.all.task == "passkey"].length if length % 512 == 0})
    rows = []
    for variant in REACH:
        cells = {length: items.cell("passkey", length, of=(variant,)) for length in lengths}
        found = {length: cell[variant, "unknown"] for length, cell in cells.items() if (variant, "unknown") in cell}
        if len(found) < 3:
            continue
        parts = [part.reset_index().assign(length=length) for length, part in found.items()]
        far = effective_context(pd.concat(parts))
        share = items.cost(variant, "unknown", max(found)).held
        passes = str(far.passes) if far.passes else f"below {far.shortest}"
        if far.gaps:
            passes += f", but not {', '.join(map(str, far.gaps))}"
        between = f"[{far.low}, {far.high}]"
        shown = [f"{found[length].score.mean():.2f}" if length in found else "" for length in lengths]
        rows.append([name_of(variant), f"{share * BYTES_PER_TOKEN:,.0f}", f"{passes} {between}", *shown])
    return table(["", "bytes per token", "finds 90 % of passkeys to", *map(str, lengths)], rows)


def windows(items: Items) -> str:
    """How far constant windows find passkeys."""
    every = items.all[items.all.variant.str.startswith("window")]
    rows = []
    for variant, part in sorted(every.groupby("variant"), key=lambda pair: int(pair[0].split()[1])):
        score = part.groupby("length").score.mean()
        rows.append([variant, ", ".join(f"{length}: {value:.2f}" for length, value in score.items())])
    return table(["constant window", "passkeys found by length"], rows)


def ahead(items: Items) -> str:
    """Plans that look ahead to 4096 tokens, and to 8192."""
    names = {"half": "ahead-0.5", "quarter": "ahead-0.25", "eighth": "ahead-0.125"}
    names |= {"quarter-bytes": "bits-ahead-0.25", "eighth-bytes": "bits-ahead-0.125"}
    names |= {"sixteenth-bytes": "bits-ahead-0.0625"}
    rows, lengths = [], (4096, 8192)
    for default, every in names.items():
        for task in ("passkey", "copy"):
            shown = []
            for length in lengths:
                cell = items.cell(task, length, of=(*names, *names.values()))
                if (default, "unknown") not in cell or (every, "unknown") not in cell:
                    shown.append("-")
                    continue
                one, two = cell[every, "unknown"].nll, cell[default, "unknown"].nll
                shown.append(f"{two.mean():.2f}, {one.mean():.2f}: {signed((one - two).to_numpy())}")
            rows.append([name_of(default), task, *shown])
    return table(["NLL of the plan ahead to 4096, to 8192: difference", "", *map(str, lengths)], rows)


def tables(items: Items) -> Iterator[tuple[str, str]]:
    """All of them by name."""
    for length in LENGTHS:
        yield f"length-{length}", at_length(items, length)
        yield f"plans-{length}", at_length(items, length, of=OURS)
    yield "lengths", over_lengths(items)
    yield "plans", over_lengths(items, OURS)
    yield "pairs", pairs(items)
    yield "pairs-by-task", pairs_by_task(items)
    yield "reach", reach(items)
    yield "windows", windows(items)
    yield "ahead", ahead(items)


def fill(pages: Sequence[Path], found: Mapping[str, str]) -> None:
    """Put tables between their marks in pages."""
    for page in pages:
        text = page.read_text()
        for name, content in found.items():
            mark = f"<!-- table {name} -->"
            text = re.sub(
                f"{mark}\n.*?<!-- end -->", lambda _, m=mark, c=content: f"{m}\n{c}\n<!-- end -->", text, flags=re.S
            )
        page.write_text(text)


def main() -> None:
    fill(PAGES, dict(tables(Items())))


if __name__ == "__main__":
    main()
