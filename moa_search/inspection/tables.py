"""Plans as terminal tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from moa_search.formats import Plan
from moa_search.formats.plan import LengthMetrics

__all__ = [
    "density_table",
    "origin_lines",
    "predicted_loss",
    "rule_table",
    "span_table",
    "with_error",
]


HEADS_PER_LINE = 8
"""KV heads in one line of a table: as many as a terminal shows."""


def origin_lines(plan: Plan) -> list[str]:
    """What the plan is for and how it was found, one fact per line."""
    model = plan.model
    lines = [
        f"model     {model.architecture}: {model.num_hidden_layers} layers, {model.num_attention_heads} query heads, "
        f"{model.num_key_value_heads} KV heads of {model.head_dim}",
        f"spans     {plan.sink} sink tokens, at least {plan.min_span} tokens, anchored at the {plan.anchor}",
    ]
    if plan.native_layers:
        share = f"{len(plan.native_layers)} of {model.num_hidden_layers} layers"
        lines.append(f"native    {share}: {_own_window(plan)}; not counted in densities")
    origin = plan.provenance
    if origin is not None:
        how = f"{origin.searcher} search" + (f" on {origin.criterion}" if origin.criterion else "")
        budgets = ", ".join(b.asked or f"density at most {b.density:.4g} at {b.length}" for b in origin.budgets)
        bound = f"; {budgets}" if budgets else ""
        gap = "" if origin.gap is None else f"; proven within {origin.gap:.2%} of the optimum"
        lines.append(f"found by  {how}{bound}{gap}")
        lines += [f"note      {escape(note)}" for note in origin.notes]
    return lines


def density_table(plan: Plan, lengths: Sequence[int]) -> Table:
    """KV cache kept, prefill computed and predicted loss by length; shares leave native layers out, MiB doesn't."""
    predicted = {metrics.length: metrics for metrics in plan.predicted}
    table = Table(title="What it keeps", title_justify="left")
    for name in ("length", "KV cache kept", "KV MiB (16 bit)", "prefill computed", "predicted loss"):
        table.add_column(name, justify="right")
    for length in lengths:
        table.add_row(
            str(length),
            f"{plan.density(length):.1%}",
            f"{plan.kv_bytes(length) / 2**20:.1f}",
            f"{plan.attention_density(length):.1%}",
            predicted_loss(predicted[length]) if length in predicted else "",
        )
    return table


def span_table(plan: Plan, length: int) -> Table:
    """Span in tokens of every layer and KV head at one length; dense ones bold, many heads on several lines.

    Native layers show how many tokens their own window keeps, and that it is their own.
    """
    heads = plan.model.num_key_value_heads
    several_lines = heads > HEADS_PER_LINE
    table = Table(title=f"Span in tokens at {length}", title_justify="left")
    table.add_column("layer", justify="right")
    if several_lines:
        table.add_column("KV head", justify="right")
    for head in range(min(heads, HEADS_PER_LINE)):
        table.add_column(f"+{head}" if several_lines else f"KV head {head}", justify="right")
    table.add_column("kept", justify="right")
    for layer, spans in enumerate(plan.spans(length)):
        native = layer in plan.native_layers
        cells = [f"[bold]{tokens}[/bold]" if tokens == length and not native else str(tokens) for tokens in spans]
        share = _own_window(plan) if native else f"{sum(spans) / heads / length:.0%}"
        for first in range(0, heads, HEADS_PER_LINE):
            line = cells[first : first + HEADS_PER_LINE]
            line += [""] * (min(heads, HEADS_PER_LINE) - len(line))
            label = [str(first)] if several_lines else []
            table.add_row("" if first else str(layer), *label, *line, "" if first else share)
    return table


def rule_table(plan: Plan, most: int = 8) -> Table:
    """The commonest rules, then the heads of native layers, which follow none."""
    native = plan.native_layers
    counts = Counter(str(rule) for layer, rules in enumerate(plan.rules) if layer not in native for rule in rules)
    table = Table(title=f"Commonest of {len(counts)} rules", title_justify="left")
    table.add_column("span(n)")
    table.add_column("KV heads", justify="right")
    for rule, count in counts.most_common(most):
        table.add_row(rule, str(count))
    if native:
        table.add_row(_own_window(plan), str(len(native) * plan.model.num_key_value_heads))
    return table


def _own_window(plan: Plan) -> str:
    """What stands in the place of a rule in native layers."""
    return f"own window, {plan.native_window}"


def predicted_loss(metrics: LengthMetrics) -> str:
    """A predicted loss with its standard error, as far as they are known; ``≈`` where it is extrapolated."""
    if metrics.loss is None:
        return ""
    return "≈ " * metrics.extrapolated + with_error(metrics.loss, metrics.loss_error)


def with_error(value: float, error: float | None) -> str:
    """A number in four digits with its standard error in one, where that is known; losses are of any size."""
    return f"{value:.4g}" + ("" if error is None or error != error else f" ± {error:.1g}")
