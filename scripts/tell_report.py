"""A report's CSVs as the Markdown tables of docs/results.md.

Usage: python scripts/tell_report.py FOLDER [TASK]
"""

import sys
from pathlib import Path

import pandas as pd


def main() -> None:
    folder, task = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "passkey"
    effective, summary, differences = (
        read(folder, name, task).astype(object) for name in ("effective", "summary", "differences")
    )
    print("| variant | effective context [95 %] | fails at | average span | x at equal span | x at equal density |")
    print("|---|---|---|---|---|---|")
    for row in effective.to_dict("records"):
        span = f"{row['effective_context']} [{row['low']}, {row['high']}]"
        times = " | ".join(multiple(row, name) for name in ("at_equal_span", "at_equal_density"))
        print(f"| {row['variant']} | {span} | {whole(row['fails_at'])} | {whole(row['average_span'])} | {times} |")
    lengths = sorted(summary["length"].unique())
    counts = {length: summary[summary["length"] == length]["n"].iloc[0] for length in lengths}
    print("\n| variant | " + " | ".join(f"{length}, n = {counts[length]}" for length in lengths) + " |")
    print("|---" * (len(lengths) + 1) + "|")
    for name, rows in summary.groupby("variant", sort=False):
        at = {row["length"]: row for row in rows.to_dict("records")}
        cells = [score(at[length]) if length in at else "" for length in lengths]
        print(f"| {name} | {' | '.join(cells)} |")
    for against, pairs in differences[differences["against"] != "dense"].groupby("against", sort=False):
        print(f"\nNLL less {against}:\n")
        for row in pairs.to_dict("records"):
            low, high = row["nll_difference_low"], row["nll_difference_high"]
            print(f"* {row['variant']}, {row['length']}: {row['nll_difference']:+.2f} [{low:+.2f}, {high:+.2f}]")


def read(folder: Path, name: str, task: str) -> pd.DataFrame:
    table = pd.read_csv(folder / f"{name}.csv")
    return table[table["task"] == task]


def whole(value: object) -> str:
    return "" if pd.isna(value) else f"{value:.0f}"


def multiple(row: dict[str, object], name: str) -> str:
    ratio, bracket = row[name], row[f"{name}_bracket"]
    if pd.isna(ratio):
        return "" if pd.isna(bracket) else str(bracket)
    return f"{ratio:.2f} ({bracket})"


def score(row: dict[str, object]) -> str:
    exact = f"{row['score']:.2f} [{row['score_low']:.2f}, {row['score_high']:.2f}]"
    return f"{row['density']:.0%}: {row['nll']:.2f} / {exact}"


if __name__ == "__main__":
    main()
