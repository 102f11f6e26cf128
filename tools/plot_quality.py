"""The README's plot, quality over KV cache kept, from the items in docs/data: docs/images/quality.png.

Usage: python tools/plot_quality.py
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "data"
IMAGE = ROOT / "docs" / "images" / "quality.png"
LENGTH = 2048
TASKS = {"passkey": "find a passkey", "copy": "copy a passage"}
VARIANTS = {
    "uniform": ("uniform window (StreamingLLM)", "#999999", "o"),
    "moa": ("MoA's search", "#E69F00", "s"),
    "duo": ("as DuoAttention: dense or short", "#56B4E9", "^"),
    "exact": ("moa-search", "#0072B2", "D"),
}


def losses() -> pd.DataFrame:
    """Mean answer NLL by task, variant and share of the KV cache."""
    files = [DATA / f"{name}-smollm2-135m.csv" for name in ("searchers", "criteria")]
    items = pd.concat([pd.read_csv(file, usecols=["task", "length", "variant", "nll"]) for file in files])
    items = items[items.length == LENGTH].copy()
    items[["variant", "kept"]] = items.variant.str.split(" @ ", expand=True)
    return items.groupby(["task", "variant", "kept"], dropna=False).nll.mean().reset_index()


def main() -> None:
    mpl.use("Agg")
    means = losses()
    figure, axes = plt.subplots(1, len(TASKS), figsize=(9, 3.8), layout="constrained")
    for axis, (task, title) in zip(axes, TASKS.items(), strict=True):
        of_task = means[means.task == task]
        dense = of_task[of_task.variant == "dense"].nll.item()
        for variant, (label, colour, marker) in VARIANTS.items():
            of_variant = of_task[of_task.variant == variant]
            axis.plot(of_variant.kept.astype(float) * 100, of_variant.nll, label=label, color=colour, marker=marker)
        axis.axhline(dense, color="black", linestyle="dotted", label="dense attention, 100 %")
        axis.set_xscale("log", base=2)
        axis.set_xticks([12.5, 25, 50], ["12.5 %", "25 %", "50 %"])
        axis.minorticks_off()
        axis.set(title=title, xlabel="KV cache kept", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("answer NLL (lower is better)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(IMAGE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
