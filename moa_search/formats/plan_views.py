"""What a plan shows of itself: frames, pictures, and how it differs from another. ``Plan`` inherits these methods.

Pictures take ``ax=`` and return Axes; without it they make a figure that a notebook shows. pandas and matplotlib are
imported at the first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from moa_search.errors import ConfigError
from moa_search.masks import span_mask
from moa_search.spans import SpanRule

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from matplotlib.axes import Axes

    from moa_search.formats.plan import Plan

__all__ = ["PlanViews"]

MASK_POINTS = 512
"""Positions along each side of a picture of a mask: more than a figure has pixels for."""

SHORTEST = 64
"""Tokens that densities are drawn from on."""


class PlanViews:
    """Frames and pictures of a plan."""

    @property
    def _plan(self) -> Plan:
        """The plan that these views are of; nothing else inherits them."""
        return self  # type: ignore[return-value]

    @property
    def lengths(self) -> list[int]:
        """Lengths in tokens that the plan was made for, else a quarter, half and all of the model's context."""
        plan = self._plan
        return [metrics.length for metrics in plan.predicted] or plan.model.usual_lengths

    @property
    def density_lengths(self) -> list[int]:
        """From 64 tokens up to the model's context, eight per octave: where `plot_density` draws by default."""
        longest = max(*self._plan.model.usual_lengths, *self.lengths, SHORTEST + 1)
        steps = int(np.ceil(8 * np.log2(longest / SHORTEST))) + 1
        return sorted({round(n) for n in np.geomspace(SHORTEST, longest, steps)})

    def rule_text(self, layer: int, kv_head: int) -> str:
        """The exact rule of one head, such as ``0.25n-512`` or ``dense``; of a native layer, its own window."""
        plan = self._plan
        pattern = plan.patterns[layer][kv_head]
        return f"own window, {plan.native_window}" if pattern.kind == "native" else str(pattern.rule)

    def to_frame(self, lengths: int | Sequence[int] = ()) -> pd.DataFrame:
        """The plan as a tidy frame, one row per length, layer and KV head.

        Args:
            lengths: Context lengths in tokens, or one; by default `lengths`.

        Returns:
            Columns ``length``, ``layer``, ``kv_head``, ``kind``, ``rule``, ``alpha`` and ``beta`` (missing in native
            layers), ``span`` in tokens, and ``share``, which is span / length.
        """
        import pandas as pd

        plan, rows = self._plan, []
        for length in self._checked(lengths):
            for layer, heads in enumerate(plan.spans(length)):
                for head, tokens in enumerate(heads):
                    pattern = plan.patterns[layer][head]
                    rule = None if pattern.kind == "native" else pattern.rule
                    rows.append(
                        {
                            "length": length,
                            "layer": layer,
                            "kv_head": head,
                            "kind": pattern.kind,
                            "rule": self.rule_text(layer, head),
                            "alpha": rule.alpha if rule else None,
                            "beta": rule.beta if rule else None,
                            "span": tokens,
                            "share": tokens / length,
                        }
                    )
        return pd.DataFrame(rows).astype({"alpha": "Int64", "beta": "Float64"})

    def diff(self, other: Plan, lengths: int | Sequence[int] = ()) -> pd.DataFrame:
        """The KV heads that ``other`` treats differently, one row per length, layer and KV head.

        Args:
            other: A plan for the same model.
            lengths: Context lengths in tokens, or one; by default `lengths` of both.

        Returns:
            Columns ``length``, ``layer``, ``kv_head``, ``rule``, ``other_rule``, ``span``, ``other_span`` and
            ``change``, which is other_span - span. No row where rules and spans are the same; rules that are the same
            can have different spans where sink or block differ.

        Raises:
            ModelMismatchError: The plans are for different models.
        """
        self._plan.model.require(other.model, "the plan to compare with")
        wanted = sorted({*self._checked(lengths), *other._checked(lengths)})
        keys = ["length", "layer", "kv_head"]
        mine, theirs = self.to_frame(wanted)[[*keys, "rule", "span"]], other.to_frame(wanted)[[*keys, "rule", "span"]]
        both = mine.merge(theirs.rename(columns={"rule": "other_rule", "span": "other_span"}), on=keys)
        both = both[[*keys, "rule", "other_rule", "span", "other_span"]]
        both["change"] = both["other_span"] - both["span"]
        return both[(both["change"] != 0) | (both["rule"] != both["other_rule"])].reset_index(drop=True)

    def plot_spans(self, length: int | None = None, *, ax: Axes | None = None) -> Axes:
        """Heat map of the share of the context that each layer and KV head keeps.

        Native layers are grey: they keep the model's own window whatever the plan says.

        Args:
            length: Context length in tokens; by default the longest of `lengths`.
            ax: Axes to draw on.
        """
        from moa_search.pictures import draw_cells

        plan, at = self._plan, self._one(length)
        native = plan.native_layers
        return draw_cells(
            self.shares(at),
            ax,
            title=f"{at} tokens: {plan.density(at):.1%} of the KV cache kept",
            label="span / n",
            limits=(0, 1),
            xlabel=f"layer (grey: own window, {plan.native_window})" if native else "layer",
        )

    def plot_diff(self, other: Plan, length: int | None = None, *, ax: Axes | None = None) -> Axes:
        """Heat map of how much more (purple) or less (orange) of the context ``other`` keeps.

        Args:
            other: A plan for the same model.
            length: Context length in tokens; by default the longest of `lengths`.
            ax: Axes to draw on.

        Raises:
            ModelMismatchError: The plans are for different models.
        """
        from moa_search.pictures import draw_cells

        self._plan.model.require(other.model, "the plan to compare with")
        at = self._one(length)
        return draw_cells(
            other.shares(at) - self.shares(at),
            ax,
            title=f"{at} tokens: {self._plan.density(at):.1%} of the KV cache, {other.density(at):.1%} in the other",
            label="change of span / n",
            limits=(-1, 1),
            colours="PuOr",
        )

    def plot_mask(self, layer: int, head: int, n: int, *, ax: Axes | None = None) -> Axes:
        """Which keys the queries of one KV head attend.

        Args:
            layer: Layer.
            head: KV head.
            n: Tokens of the sequence.
            ax: Axes to draw on.

        Raises:
            ConfigError: The model has no such layer or KV head.
        """
        from moa_search.pictures import draw_mask

        plan, n = self._plan, self._one(n)
        plan.model.require_head(layer, head)
        kept = f"{plan.spans(n)[layer][head] / n:.1%}"
        return draw_mask(
            self._mask(layer, head, n),
            n,
            ax,
            title=f"layer {layer}, KV head {head}: {self.rule_text(layer, head)}\n{kept} kept at {n} tokens",
            native=layer in plan.native_layers,
        )

    def plot_density(self, lengths: Sequence[int] = (), *, ax: Axes | None = None) -> Axes:
        """Shares of the KV cache that is kept and of the prefill that is computed, over the length; budgets as marks.

        Args:
            lengths: Context lengths in tokens; by default `density_lengths`.
            ax: Axes to draw on.
        """
        from moa_search.pictures import draw_lines

        plan = self._plan
        at = sorted(self._checked(lengths or self.density_lengths))
        lines = {
            "KV cache kept": [100 * plan.density(n) for n in at],
            "prefill computed": [100 * share for share in plan.attention_densities(at)],
        }
        ax = draw_lines(at, lines, ax, title="", xlabel="context (tokens)", ylabel="share of dense (%)")
        budgets = [(b.length, 100 * b.density) for b in self._budgets() if b.density is not None]
        if budgets:
            ink = ax.xaxis.label.get_color()
            ax.plot(*zip(*budgets, strict=True), "_", color=ink, markersize=14, markeredgewidth=2, label="budget")
            ax.legend(frameon=False)
        return ax

    def _repr_html_(self) -> str:
        """A small heat map with every head's rule under the mouse, and what the plan keeps."""
        from moa_search.pictures import cell_grid, hex_colours

        plan, at = self._plan, self._one(None)
        origin = plan.provenance
        found = (
            f", {origin.searcher} search" + (f" on {origin.criterion}" if origin.criterion else "") if origin else ""
        )
        grid = cell_grid(
            hex_colours(self.shares(at), low=0, high=1),
            self.cell_texts(at),
            label=f"Share of {at} tokens kept by layer and KV head",
            focusable=False,
        )
        rows = "".join(
            f"<tr><td>{n}</td><td>{plan.density(n):.1%}</td><td>{plan.attention_density(n):.1%}</td></tr>"
            for n in self.lengths
        )
        return (
            f"<div><p><b>Plan</b> for {escape(plan.model.architecture)}, {plan.model.num_hidden_layers} layers of "
            f"{plan.model.num_key_value_heads} KV heads{escape(found)}; colours at {at} tokens</p>{grid}"
            "<table><thead><tr><th>tokens</th><th>KV cache kept</th><th>prefill computed</th></tr></thead>"
            f"<tbody>{rows}</tbody></table></div>"
        )

    def cell_texts(self, length: int) -> list[list[str]]:
        """Of each layer and KV head its exact rule and its span at ``length`` tokens, in words."""
        return [
            [
                f"layer {layer}, KV head {head}: {self.rule_text(layer, head)}; {tokens} of {length} tokens "
                f"({tokens / length:.1%})"
                for head, tokens in enumerate(heads)
            ]
            for layer, heads in enumerate(self._plan.spans(length))
        ]

    def shares(self, length: int) -> npt.NDArray[np.float64]:
        """Span over ``length`` of every head, ``[layer, kv_head]``; NaN in native layers."""
        shares = np.array(self._plan.spans(length), dtype=np.float64) / length
        shares[list(self._plan.native_layers)] = np.nan
        return shares

    def _mask(self, layer: int, kv_head: int, n: int) -> npt.NDArray[np.bool_]:
        """``[query, key]`` at `MASK_POINTS` positions at most; native layers know no sink."""
        plan = self._plan
        if layer in plan.native_layers:
            rule = SpanRule(plan.native_window or n, 0)
            return span_mask(rule, n, sink=0, min_span=1, most_points=MASK_POINTS)
        rule = plan.rules[layer][kv_head]
        if plan.anchor == "prompt":
            rule = SpanRule(plan.spans(n)[layer][kv_head], 0)
        return span_mask(rule, n, sink=plan.sink, min_span=plan.min_span, most_points=MASK_POINTS)

    def _checked(self, lengths: int | Iterable[int]) -> list[int]:
        """The lengths, or `lengths` where there are none."""
        wanted = [lengths] if isinstance(lengths, int) else list(lengths) or self.lengths
        if min(wanted) < 1:
            raise ConfigError(f"length {min(wanted)} is out of range; it must be at least 1 token")
        return wanted

    def _one(self, length: int | None) -> int:
        return max(self.lengths) if length is None else self._checked([length])[0]

    def _budgets(self) -> Sequence[Any]:
        origin = self._plan.provenance
        return origin.budgets if origin else ()
