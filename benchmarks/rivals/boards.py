"""The tables of docs/results-boards.md, from docs/data: ``python boards.py``. See `tables`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
from cells import BOARD, FEWER, FOUND, GEMMA, RULER
from tables import DATA, ROOT, fill, name_of, signed, table

PAGE = ROOT / "docs" / "results-boards.md"
KEYS = ["variant", "question"]
UNKNOWN = "unknown"
VARIANTS: tuple[tuple[str, str], ...] = (
    *((name, UNKNOWN) for name in (*BOARD, *FEWER)),
    ("snapkv@0.25", "known"),
)
"""Of both boards, and when the question is known."""
ALIASES = {
    "full": "dense, in kvpress's environment",
    "int4": "int4, as vLLM stores it",
    "quantized-cache-4": "QuantizedCache, 4 bits",
}
GEMMA_SHARES = {"gemma-50": "50", "gemma-25": "25", "gemma-12": "12.5"}


class Boards:
    """Readings of boards, of items that all variants answered.

    Attributes:
        every: One row for each reading.
        costs: What variants hold, by variant, question and length.
    """

    def __init__(self) -> None:
        self.every = pd.read_csv(DATA / "boards-smollm2-135m.csv.gz")
        costs = pd.read_csv(DATA / "boards-costs-smollm2-135m.csv")
        self.costs = costs.set_index([*KEYS, "length"]).sort_index()

    def common(self, tasks: Sequence[str], length: int) -> pd.DataFrame:
        """Rows of each task's items that all of `VARIANTS` answered."""
        rows = self.every[self.every.task.isin(tasks) & (self.every.length == length)]
        answered = rows.groupby(["task", "item"])[KEYS].apply(lambda part: set(part.itertuples(index=False, name=None)))
        whole = answered[answered.map(lambda found: found >= set(VARIANTS))].index
        return rows[rows.set_index(["task", "item"]).index.isin(whole)]

    def first_columns(self, variant: str, question: str, length: int) -> list[str]:
        """A variant's name, and what it holds."""
        cost = self.costs.loc[variant, question, length]
        name = ALIASES.get(variant) or name_of(variant)
        known = ", first question known" if question == "known" else ""
        passes = f"{cost.extra_passes:.1f}".removesuffix(".0")
        return [name + known, f"{100 * cost.tokens_read:.0f}%", f"{100 * cost.held:.1f}%", passes]


FIRST = ("tokens read", "bytes held", "extra passes")


def turns(boards: Boards, length: int) -> str:
    """Four questions on one cache: each turn's answer, and all of an item less dense attention's."""
    rows = boards.common(["turns"], length)
    if rows.empty:
        return ""
    by_item = rows.pivot_table(index="item", columns=KEYS, values="nll")
    shown = []
    for variant, question in VARIANTS:
        part = rows[(rows.variant == variant) & (rows.question == question)]
        means = part.groupby("turn")[["nll", "score"]].mean()
        by_turn = [f"{nll:.2f} / {score:.2f}" for nll, score in means.itertuples(index=False)]
        less = (by_item[variant, question] - by_item["dense", UNKNOWN]).to_numpy()
        shown.append(
            [*boards.first_columns(variant, question, length), *by_turn, "" if variant == "dense" else signed(less)]
        )
    header = [f"{length} tokens, n = {len(by_item)} documents", *FIRST, *(f"turn {turn}" for turn in range(1, 5))]
    return table([*header, "NLL less dense"], shown)


def ruler(boards: Boards, length: int) -> str:
    """RULER's scores by task, their mean, and differences to dense attention's on equal items."""
    rows = boards.common(FOUND, length)
    if rows.empty:
        return ""
    scores = rows.pivot_table(index=["task", "item"], columns=KEYS, values="score")
    losses = rows.pivot_table(index=["task", "item"], columns=KEYS, values="nll")
    shown = []
    for key in VARIANTS:
        by_task = 100 * scores[key].groupby("task").mean().reindex(FOUND)
        less = [one[key] - one["dense", UNKNOWN] for one in (100 * scores, losses)]
        differences = ["", ""] if key[0] == "dense" else [signed(less[0].to_numpy(), 0), signed(less[1].to_numpy())]
        means = [f"**{by_task.mean():.0f}**", *(f"{one:.0f}" for one in by_task)]
        shown.append([*boards.first_columns(*key, length)[:3], *means, *differences])
    counts = scores.groupby("task").size()
    n = f"n = {counts.min()}" + ("" if counts.min() == counts.max() else f" to {counts.max()}")
    names = [task.removeprefix("ruler:niah_") for task in FOUND]
    header = [f"{length} tokens, {n} a task", *FIRST[:2], "mean", *names, "mean less dense", "NLL less dense"]
    return table(header, shown)


def ruler_dense(boards: Boards) -> str:
    """What dense attention does on all thirteen."""
    rows = boards.every[(boards.every.variant == "dense") & boards.every.task.isin(RULER)]
    shown = []
    for length, of_length in rows.groupby("length"):
        for task in RULER:
            part = of_length[of_length.task == task]
            if len(part):
                score, nll = 100 * part.score.mean(), part.nll.mean()
                shown.append([task.removeprefix("ruler:"), str(length), f"{score:.0f}", f"{nll:.2f}", str(len(part))])
    return table(["task", "tokens", "score", "NLL of the wanted answer", "n"], shown)


def gemma() -> str:
    """Gemma 3 270M on equal items."""
    rows = pd.read_csv(DATA / "boards-gemma3-270m.csv.gz")
    costs = pd.read_csv(DATA / "boards-costs-gemma3-270m.csv").set_index("variant")
    shown = []
    for variant in GEMMA:
        cells = []
        for task in ("passkey", "copy"):
            of_task = rows[rows.task == task].set_index("item")
            part, dense = of_task[of_task.variant == variant], of_task[of_task.variant == "dense"]
            less = "" if variant == "dense" else signed((part.nll - dense.nll).to_numpy())
            cells += [f"{part.nll.mean():.2f} / {part.score.mean():.2f}", less]
        name = f"**spans and bits, at most {GEMMA_SHARES[variant]} %**" if variant in GEMMA_SHARES else variant
        cost = costs.loc[variant]
        shown.append([name, f"{100 * cost.tokens_read:.0f}%", f"{100 * cost.held:.1f}%", *cells])
    n = rows.groupby(["variant", "task"]).item.nunique().min()
    return table([f"1024 tokens, n = {n}", *FIRST[:2], "passkey", "less dense", "copy", "less dense"], shown)


def tables(boards: Boards) -> Iterator[tuple[str, str]]:
    """All of them by name."""
    for length in (1024, 2048, 4096):
        yield f"turns-{length}", turns(boards, length)
        yield f"ruler-{length}", ruler(boards, length)
    yield "ruler-dense", ruler_dense(boards)
    yield "gemma", gemma()


def main() -> None:
    fill([PAGE], dict(tables(Boards())))


if __name__ == "__main__":
    main()
