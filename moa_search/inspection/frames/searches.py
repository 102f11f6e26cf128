"""Tables of searches: fronts, validations, searchers side by side, and studies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from moa_search.inspection.frames.bits import bits_lines
from moa_search.inspection.frames.plans import predicted_text
from moa_search.inspection.printing import Column, Table, column, digits, is_missing, percent, plain, with_error
from moa_search.search.budgets.specs import BYTE_KINDS

if TYPE_CHECKING:
    from moa_search.search import Front
    from moa_search.search.tuning import Summary

SHOWN_REMARKS = 5


def front_frame(front: Front) -> Table:
    """One row per plan: density, predicted and held-out loss at each length, and gap; the chosen one marked."""
    rows: list[dict[str, Any]] = front.rows()
    for index, (row, name, plan) in enumerate(zip(rows, front.names, front.plans, strict=True)):
        mark = f" (plan.json{', knee' if front.has_knee else ''})" if front.is_chosen(index) else ""
        row |= {"plan": name + mark, "asked": front.asked[index] if front.asked else None}
        row |= {f"extrapolated@{metrics.length}": metrics.extrapolated for metrics in plan.predicted}
        for entry in plan.validated:
            row |= {f"true_loss@{entry.length}": entry.loss, f"dense_loss@{entry.length}": entry.dense_loss}
    frame = pd.DataFrame(rows)
    columns = [Column("plan", lambda row: row["plan"], left=True)]
    columns += [column("asked", None, "{:.4g}".format)] if front.asked else []
    for length in dict.fromkeys(metrics.length for plan in front.plans for metrics in plan.predicted):
        columns += _kept(f"@{length}", bits=f"share@{length}" in frame)
        columns.append(_predicted(length))
    for length in dict.fromkeys(entry.length for plan in front.plans for entry in plan.validated):
        columns.append(_held_out(length))
    columns += [column("gap", None, "{:.2%}".format)] if frame["gap"].notna().any() else []
    guessed = any(metrics.extrapolated for plan in front.plans for metrics in plan.predicted)
    criterion = front.plans[0].provenance.criterion if front.plans[0].provenance else None
    by = f", predicted loss by {criterion}" if criterion else ""
    return Table(frame, columns, f"Plans of the front{by}" + ("; ~ is extrapolated" if guessed else ""))


def _kept(at: str, *, bits: bool) -> list[Column]:
    """What is kept ``at`` a length: of tokens and, where bits differ, of bytes."""
    if not bits:
        return [column(f"density{at}", f"kept {at}".strip(), percent)]
    return [
        column(f"density{at}", f"tokens {at}".strip(), percent),
        column(f"share{at}", f"bytes {at}".strip(), percent),
    ]


def _predicted(length: int) -> Column:
    def show(row: Any) -> str:
        found = {name: row[f"{name}@{length}"] for name in ("loss", "loss_error", "extrapolated")}
        return predicted_text(found)

    return Column(f"predicted loss @{length}", show)


def _held_out(length: int) -> Column:
    def show(row: Any) -> str:
        loss, dense = row[f"true_loss@{length}"], row[f"dense_loss@{length}"]
        return "" if is_missing(loss) else f"{loss:.3f}" + ("" if is_missing(dense) else f" (dense {dense:.3f})")

    return Column(f"held-out loss @{length}", show)


EXPLANATION = "predicted loss: estimated rise of the answers' loss over full attention, ± its error"
GAP = "; gap: the best plan loses at most that much less"


def explanation(front: Front) -> str:
    """What the numbers of `front_frame` mean, in one line."""
    proven = any(plan.provenance is not None and plan.provenance.gap is not None for plan in front.plans)
    return EXPLANATION + (GAP if proven else "")


def budget_lines(front: Front) -> list[str]:
    """What the chosen plan stores in which bits, and for each budget what was asked and what it uses.

    Densities and shares that the front's table shows are left out.
    """
    shown = {metrics.length for metrics in front.chosen.predicted}
    in_table = ("density",) if front.chosen.is_plain else ("density", "share")
    lengths = [use.asked.length for use in front.usage if use.asked.kind in BYTE_KINDS] or front.chosen.lengths
    return bits_lines(front.chosen, max(lengths)) + [
        f"{use.asked.text}: uses {use.used}"
        for use in front.usage
        if use.asked.kind not in in_table or use.asked.length not in shown
    ]


def validation_frame(rows: pd.DataFrame) -> Table:
    """True losses of a front's plans, as `moa_search.api.validate_front` returns them; dense attention first."""
    names = ["length", "true_loss", "dense_loss"]
    dense = rows[rows["plan"] == rows["plan"].iloc[0]][names].assign(plan="dense", density=1.0, share=1.0)
    dense["true_loss"] = dense["dense_loss"]
    frame = pd.concat([dense, rows]).sort_values("length", kind="stable")

    def name(row: Any) -> str:
        mark = {"chosen": " chosen", "chosen_before": " was chosen"}
        return str(row["plan"]) + next((text for which, text in mark.items() if row[which] is True), "")

    columns = [
        column("length", "tokens"),
        Column("plan", name, left=True, stands_out=lambda row: row["chosen"] is True),
        *_kept("", bits=bool((rows["share"] != rows["density"]).any())),
        Column("loss", lambda row: with_error(row["true_loss"], row.get("true_error"), ".3f", ".3f")),
        Column("above dense", lambda row: with_error(row["difference"], row["difference_error"], ".3f", ".3f")),
    ]
    return Table(frame, columns, "Held-out loss, nats per answer token", group=["length"])


def comparison_frame(rows: pd.DataFrame, criterion: str) -> Table:
    """Searchers side by side, as `moa_search.api.compare_searchers` returns them."""
    columns = [column("searcher", left=True)]
    in_bits = rows["bits"].notna().any()
    for length in rows.attrs["lengths"]:
        columns += _kept(f"@{length}", bits=in_bits)
        columns.append(_loss(length))
    columns += [_true_loss(length) for length in rows.attrs["true_lengths"]]
    columns.append(column("cpu_s", "CPU s", digits(1)))
    return Table(rows, columns, f"Searchers at the same budget, predicted loss by {criterion}")


def comparison_lines(rows: pd.DataFrame) -> list[str]:
    """The bits that each searcher chose, where it did, and why one has no plan."""
    shown = [(row["searcher"], plain(row["bits"]), plain(row["note"])) for row in rows.to_dict("records")]
    chosen = [f"{name}: key/value bits {bits} KV heads" for name, bits, _ in shown if bits]
    return chosen + [f"{name}: no plan, {note}" for name, _, note in shown if note]


def _loss(length: int) -> Column:
    return Column(
        f"predicted loss @{length}", lambda row: with_error(row[f"loss@{length}"], row[f"loss_error@{length}"])
    )


def _true_loss(length: int) -> Column:
    return Column(
        f"true loss @{length}",
        lambda row: with_error(row[f"true_loss@{length}"], row[f"true_error@{length}"], ".3f", ".3f"),
    )


def study_frame(summary: Summary) -> Table:
    """The best trials of a study."""
    rows = [
        {
            "trial": result.number,
            "loss": result.values[0],
            "density": result.values[1] if len(result.values) > 1 else None,
            "criterion": result.knobs.criterion,
            "from": "the front" if result.is_seed else "the study",
        }
        for result in summary.best
    ]
    columns = [
        column("trial"),
        column("loss", "held-out loss", digits(4)),
        column("density", None, "{:.2%}".format),
        column("criterion"),
        column("from", left=True),
    ]
    return Table(pd.DataFrame(rows, columns=["trial", "loss", "density", "criterion", "from"]), columns, "Best plans")


def study_lines(summary: Summary) -> list[str]:
    """Trials by state, what tuning gained, and what went wrong."""
    counts = ", ".join(f"{count} {state.lower()}" for state, count in summary.counts.items() if count)
    lines = [f"trials: {counts}; {summary.reused} had a plan that was known"]
    if summary.seeds_best is not None and summary.tuned_best is not None:
        change = summary.tuned_best / summary.seeds_best - 1 if summary.seeds_best > 0 else 0.0
        lines.append(f"best of the front {summary.seeds_best:.4f}, best tuned {summary.tuned_best:.4f} ({change:+.1%})")
    lines += summary.remarks[:SHOWN_REMARKS]
    if len(summary.remarks) > SHOWN_REMARKS:
        lines.append(f"... and {len(summary.remarks) - SHOWN_REMARKS} more remarks")
    return lines
