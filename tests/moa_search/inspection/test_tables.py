"""What a user reads in a terminal of 120 columns."""

import io
import re

import pytest
from rich.console import Console

from moa_search.formats import Plan
from moa_search.formats.provenance import Budget, LengthMetrics, Provenance
from moa_search.inspection.frames.plans import plan_facts, plan_frame, rule_frame, span_frame
from moa_search.inspection.frames.searches import front_frame
from moa_search.inspection.printing import fact_lines, to_rich
from moa_search.search import SearchOptions, search_profile
from moa_search.spans import DENSE, SpanRule


def render(table):
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(to_rich(table))
    return console.export_text()


def cells(text):
    """The rows of a rendered table, stripped."""
    rows = [re.split(r"[│┃]", line)[1:-1] for line in text.splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in row] for row in rows]


class TestOrigin:
    def test_model_spans_and_search(self, tiny_plan):
        model, spans, found = fact_lines(plan_facts(tiny_plan))
        assert "llama: 3 layers, 4 query heads, 2 KV heads of 8" in model
        assert "4 sink tokens, at least 36 tokens, anchored at the position" in spans
        assert "exact search on squared; density at most 0.5 at 1024; proven within 0.80% of the optimum" in found

    def test_a_plan_made_by_hand(self, tiny_plan):
        assert len(plan_facts(tiny_plan.model_copy(update={"provenance": None}))) == 2

    def test_what_is_unknown_is_left_out(self, tiny_plan):
        origin = tiny_plan.provenance.model_copy(update={"criterion": None, "budgets": (), "gap": None})
        facts = plan_facts(tiny_plan.model_copy(update={"provenance": origin}))
        assert fact_lines(facts)[2] == "found by  exact search"


class TestDensities:
    def test_what_is_kept_computed_and_lost(self, tiny_plan):
        predicted = LengthMetrics(length=1024, density=0.5, attention_density=0.75, loss=0.125, loss_error=0.03)
        plan = tiny_plan.model_copy(update={"predicted": (predicted,)})
        _, profiled, other = cells(render(plan_frame(plan, [1024, 2048])))
        mebibytes = 2 * sum(map(sum, plan.spans(1024))) * 8 * 2 / 2**20
        kept, computed = f"{plan.density(1024):.1%}", f"{plan.attention_density(1024):.1%}"
        assert profiled == ["1024", kept, f"{mebibytes:.1f}", computed, "0.125 ± 0.03"]
        assert other[0] == "2048"
        assert other[4] == ""

    @pytest.mark.parametrize(("loss", "shown"), [(0.125, "0.125"), (None, "")])
    def test_a_loss_without_error_or_none(self, tiny_plan, loss, shown):
        metrics = tiny_plan.predicted[0].model_copy(update={"loss": loss})
        plan = tiny_plan.model_copy(update={"predicted": (metrics,)})
        assert cells(render(plan_frame(plan, [1024])))[1][4] == shown


class TestSpans:
    def test_every_span_can_be_read(self, sized_plan):
        text = render(span_frame(sized_plan, 2048))
        assert "Span in tokens at 2048" in text
        assert "…" not in text
        shown = [int(word) for word in re.findall(r"\b\d{4}\b", text.split("\n", 1)[1])]
        assert shown == [span for layer in sized_plan.spans(2048) for span in layer]

    def test_layer_and_share(self, tiny_plan):
        rows = cells(render(span_frame(tiny_plan, 1024)))
        assert rows[0] == ["layer", "KV head 0", "KV head 1", "kept"]
        spans = tiny_plan.spans(1024)
        assert rows[2] == ["1", str(spans[1][0]), "1024", f"{sum(spans[1]) / 2048:.0%}"]

    def test_many_heads_stand_on_several_lines(self, uneven_plan):
        header, first, second, *_ = cells(render(span_frame(uneven_plan, 2048)))
        assert header == ["layer", "KV head", *(f"+{i}" for i in range(8)), "kept"]
        assert first[:3] == ["0", "0", "1000"]
        assert second == ["", "8", "1008", "1009", "1010", "2048", "", "", "", "", ""]

    def test_dense_spans_stand_out(self, tiny_plan):
        console = Console(force_terminal=True, width=120, file=io.StringIO())
        console.print(to_rich(span_frame(tiny_plan, 1024)))
        text = console.file.getvalue()
        bold = re.findall(r"\x1b\[1m\s*(\d+)\x1b\[0m", text)
        assert bold == ["1024"]


def test_facts_name_budgets_of_every_kind(tiny_signature):
    budgets = (Budget(length=64, density=0.5), Budget(length=64, share=0.25), Budget(length=64, asked="kv=1MiB@64"))
    origin = Provenance(searcher="exact", budgets=budgets)
    facts = plan_facts(Plan.uniform(DENSE, tiny_signature, provenance=origin))
    assert facts["found by"].endswith("; density at most 0.5 at 64; share of bytes at most 0.25 at 64; kv=1MiB@64")


def test_commonest_rules_first(tiny_signature):
    rules = [[SpanRule(64, 0), DENSE], [SpanRule(-96, 128), DENSE], [SpanRule(64, 0), DENSE]]
    text = render(rule_frame(Plan.from_rules(rules, tiny_signature)))
    assert "Commonest of 3 rules" in text
    assert cells(text)[1:] == [["dense", "3"], ["64", "2"], ["0.5n-96", "1"]]
    assert cells(render(rule_frame(Plan.from_rules(rules, tiny_signature), most=1)))[1:] == [["dense", "3"]]


class TestNativeLayers:
    def test_the_origin_names_their_window(self, native_plan):
        lines = fact_lines(plan_facts(native_plan))
        assert lines[2] == "native    1 of 3 layers: own window, 128; not counted in densities"

    @pytest.mark.parametrize(("length", "kept"), [(100, "100"), (1024, "128")])
    def test_spans_are_their_windows_and_never_dense(self, native_plan, length, kept):
        rows = cells(render(span_frame(native_plan, length)))
        assert rows[2] == ["1", kept, kept, "own window, 128"]
        console = Console(force_terminal=True, width=120, file=io.StringIO())
        console.print(to_rich(span_frame(native_plan, length)))
        line = next(line for line in console.file.getvalue().splitlines() if "own window" in line)
        assert "\x1b[1m" not in line

    def test_they_follow_no_rule(self, native_plan):
        text = render(rule_frame(native_plan))
        assert "Commonest of 4 rules" in text
        assert ["dense", "1"] in cells(text)
        assert cells(text)[-1] == ["own window, 128", "2"]

    def test_bytes_count_them_and_shares_do_not(self, native_plan):
        kept, mebibytes = cells(render(plan_frame(native_plan, [2**20])))[1][1:3]
        assert kept == f"{native_plan.density(2**20):.1%}"
        assert mebibytes == f"{(native_plan.density(2**20) * 4 * 2**20 + 2 * 128) * 32 / 2**20:.1f}"


class TestFront:
    def test_every_plan_with_density_and_loss_at_every_length(self, tiny_profile):
        front = search_profile(tiny_profile, SearchOptions(density=[0.4], criterion="squared", front_steps=3))
        above, header, *rows = cells(render(front_frame(front)))
        assert above == ["", *("kept", "predicted loss") * 3, ""]
        assert header == ["plan", "@512", "@512", "@1024", "@1024", "@2048", "@2048", "gap"]
        assert [row[0] for row in rows] == ["00 (plan.json)", *(f"{i:02d}" for i in range(1, len(front.plans)))]
        for row, plan in zip(rows, front.plans, strict=True):
            for at, metrics in zip((1, 3, 5), plan.predicted, strict=True):
                assert row[at] == f"{metrics.density:.1%}"
                loss = f"{metrics.loss:.4g} ± {metrics.loss_error:.1g}"
                assert row[at + 1] == (f"~ {loss}" if metrics.length == 2048 else loss), "2048 is extrapolated"
            assert row[-1] == "0.00%"

    def test_a_uniform_plan_has_no_gap(self, tiny_profile):
        front = search_profile(tiny_profile, SearchOptions(density=[0.4], criterion="squared", searcher="uniform"))
        assert "gap" not in cells(render(front_frame(front)))[1]
