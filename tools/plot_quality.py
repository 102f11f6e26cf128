"""The README's plot, quality over bytes of the KV cache, from the items in docs/data: docs/images/quality.png.

Usage: python tools/plot_quality.py
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from moa_search.evaluation.statistics import bootstrap_interval

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "data"
IMAGE = ROOT / "docs" / "images" / "quality.png"
LENGTH = 2048
TASKS = {"passkey": "find a passkey", "copy": "copy a passage"}
UNIFORM = ["uniform like half", "uniform like quarter", "uniform like eighth"]
SERIES = {
    "uniform window (StreamingLLM)": ("#999999", "o", UNIFORM),
    "SnapKV": ("#CC79A7", "v", ["snapkv@0.25", "snapkv@0.125"]),
    "MoA's search": ("#E69F00", "s", ["moa-0.5", "moa-0.25", "moa-0.125"]),
    "KVzip, if its tokens are freed": ("#009E73", "^", ["kvzip@0.25", "kvzip@0.125", "kvzip@0.0625"]),
    "8 and 4 bits, as in vLLM": ("#D55E00", "P", ["int8", "int4"]),
    "moa-search, spans alone": ("#56B4E9", "d", ["half", "quarter", "eighth"]),
    "moa-search, spans and bits": ("#0072B2", "D", ["quarter-bytes", "eighth-bytes", "sixteenth-bytes"]),
}


def losses() -> tuple[dict[str, pd.DataFrame], pd.Series]:
    """By task the answers' NLL less dense attention's, ``[item, variant]``, and what variants hold in per cent."""
    items = pd.read_csv(DATA / "rivals-smollm2-135m.csv.gz")
    items = items[(items.length == LENGTH) & (items.question == "unknown") & (items.answers == "forced")]
    costs = pd.read_csv(DATA / "rivals-costs-smollm2-135m.csv")
    costs = costs[(costs.length == LENGTH) & (costs.question == "unknown")].set_index("variant")
    # kvpress masks what KVzip drops; KVzip's own code frees it.
    shares = costs.held.where(~costs.index.str.startswith("kvzip"), costs.tokens_read)
    found = {}
    for task in TASKS:
        by_item = items[items.task == task].pivot_table(index="item", columns="variant", values="nll")
        found[task] = by_item.sub(by_item["dense"], axis=0)
    return found, 100 * shares


def main() -> None:
    mpl.use("Agg")
    differences, shares = losses()
    figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 4.4), layout="constrained", sharey=True)
    for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
        for label, (colour, marker, variants) in SERIES.items():
            values = [differences[task][variant].dropna() for variant in variants]
            means = np.array([value.mean() for value in values])
            ends = np.array([bootstrap_interval(value) for value in values]).T
            bars = np.abs(ends - means)
            axis.errorbar(shares[variants], means, bars, label=label, color=colour, marker=marker, capsize=2, lw=1.5)
        axis.axhline(0, color="black", linestyle="dotted", label="dense attention, 100 %")
        axis.set_xscale("log", base=2)
        axis.set_yscale("symlog", linthresh=0.1)
        axis.set_yticks([0, 0.05, 0.1, 0.3, 1, 3], ["0", "0.05", "0.1", "0.3", "1", "3"])
        axis.set_xticks([6.25, 12.5, 25, 50], ["6.25 %", "12.5 %", "25 %", "50 %"])
        axis.minorticks_off()
        axis.set(title=title, xlabel="bytes of the KV cache held")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("answer NLL, less dense attention's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(IMAGE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
