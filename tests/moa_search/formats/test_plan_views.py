"""A plan in a notebook."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from moa_search.errors import ConfigError, ModelMismatchError
from moa_search.formats import ModelSignature, Plan
from moa_search.formats.provenance import Budget, Provenance
from moa_search.masks import span_mask
from moa_search.spans import DENSE, SpanRule


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


class TestLengths:
    def test_those_of_the_prediction(self, tiny_plan):
        assert tiny_plan.lengths == [1024]

    @pytest.mark.parametrize(
        ("config", "lengths"),
        [
            ({}, [1024, 2048, 4096]),
            ({"max_position_embeddings": 8192}, [2048, 4096, 8192]),
            ({"max_position_embeddings": 3}, [1, 3]),
            ({"max_position_embeddings": 1}, [1]),
        ],
    )
    def test_parts_of_the_models_context(self, tiny_signature, config, lengths):
        model = ModelSignature(**{**tiny_signature.model_dump(), "config": config})
        assert Plan.uniform(DENSE, model).lengths == lengths


class TestByLength:
    def test_what_is_kept_computed_and_predicted(self, tiny_plan):
        frame = tiny_plan.by_length([512, 1024])
        assert frame["length"].tolist() == [512, 1024]
        for row in frame.itertuples():
            assert row.density == tiny_plan.density(row.length)
            assert row.attention_density == pytest.approx(tiny_plan.attention_density(row.length))
            assert row.kv_bytes == tiny_plan.kv_bytes(row.length)
        assert frame["loss"].isna().tolist() == [True, False]
        assert frame["loss"][1] == tiny_plan.predicted[0].loss

    def test_by_default_at_the_plans_lengths(self, tiny_plan):
        assert tiny_plan.by_length()["length"].tolist() == tiny_plan.lengths
        assert tiny_plan.by_length(2048)["length"].tolist() == [2048]
        with pytest.raises(ConfigError, match="at least 1 token"):
            tiny_plan.by_length([0])


class TestFrame:
    def test_a_row_per_length_layer_and_head(self, tiny_plan):
        frame = tiny_plan.to_frame([512, 1024])
        assert len(frame) == 2 * 3 * 2
        row = frame[(frame.length == 512) & (frame.layer == 2) & (frame.kv_head == 1)].iloc[0]
        assert (row.kind, row.rule, row.alpha, row.beta) == ("span", "0.78125n-96", -96, 200 / 256)
        assert row.span == tiny_plan.spans(512)[2][1]
        assert row.share == row.span / 512

    def test_shares_average_to_the_density(self, tiny_plan):
        assert tiny_plan.to_frame()["share"].mean() == pytest.approx(tiny_plan.density(1024), abs=1e-12)

    def test_native_layers_have_a_window_and_no_rule(self, native_plan):
        frame = native_plan.to_frame([1024])
        native = frame[frame.kind == "native"]
        assert native.layer.tolist() == [1, 1]
        assert native["alpha"].isna().all()
        assert native["beta"].isna().all()
        assert native["span"].tolist() == [128, 128]
        assert set(native["rule"]) == {"own window, 128"}

    def test_one_length_needs_no_list(self, tiny_plan):
        assert tiny_plan.to_frame(512).equals(tiny_plan.to_frame([512]))

    @pytest.mark.parametrize("length", [0, -5])
    def test_lengths_are_at_least_a_token(self, tiny_plan, length):
        with pytest.raises(ConfigError, match="at least 1 token"):
            tiny_plan.to_frame([1024, length])


class TestDiff:
    def other(self, plan, rule):
        rules = [list(layer) for layer in plan.rules]
        rules[2][0] = rule
        return Plan.from_rules(rules, plan.model, sink=plan.sink)

    def test_heads_that_differ_at_the_lengths_of_both(self, tiny_plan):
        other = self.other(tiny_plan, SpanRule(500, 0))  # of no known lengths: those of the model's context
        found = tiny_plan.diff(other)
        assert found["length"].tolist() == [1024, 2048, 4096]
        assert set(zip(found.layer, found.kv_head, strict=True)) == {(2, 0)}
        first = found.iloc[0]
        assert (first["rule"], first.other_rule) == ("0.1875n+128", "500")
        assert first.other_span == 500
        assert first.change == 500 - first.span

    def test_rules_that_differ_elsewhere_are_told_with_no_change(self, tiny_plan):
        same_here = tiny_plan.spans(1024)[2][0]
        (found,) = tiny_plan.diff(self.other(tiny_plan, SpanRule(same_here, 0)), [1024]).to_dict("records")
        assert found["change"] == 0

    def test_nothing_for_the_same_plan_and_nothing_for_another_model(self, tiny_plan, native_plan):
        assert tiny_plan.diff(tiny_plan).empty
        assert list(tiny_plan.diff(tiny_plan).columns)[-1] == "change"
        with pytest.raises(ModelMismatchError, match="the plan to compare with was made for another model"):
            tiny_plan.diff(native_plan)

    def test_spans_differ_where_the_sink_does(self, tiny_signature):
        rule = SpanRule(0, 0)
        small, large = (Plan.uniform(rule, tiny_signature, sink=sink) for sink in (0, 64))
        found = small.diff(large, [1024])
        assert set(found["change"]) == {64}
        assert (found["rule"] == found["other_rule"]).all()


class TestPictures:
    def test_on_axes_of_their_own_or_given_ones(self, tiny_plan):
        for draw in (
            tiny_plan.plot_spans,
            tiny_plan.plot_density,
            lambda **where: tiny_plan.plot_mask(0, 1, 300, **where),
            lambda **where: tiny_plan.plot_diff(tiny_plan, **where),
        ):
            before = pyplot.get_fignums()
            assert draw().figure.number not in before, "pyplot shows it in a notebook"
            given = Figure().subplots()
            assert draw(ax=given) is given
            assert len(pyplot.get_fignums()) == len(before) + 1

    def test_spans(self, native_plan):
        ax = native_plan.plot_spans(1024)
        shown = ax.images[0].get_array()
        assert np.ma.getmaskarray(shown).tolist() == [[False, True, False]] * 2
        assert shown[0, 0] == native_plan.spans(1024)[0][0] / 1024
        assert ax.images[0].get_cmap().name == "viridis"
        assert ax.get_xlabel() == "layer (grey: own window, 128)"
        assert native_plan.plot_spans().get_title(loc="left").startswith("4096 tokens")

    def test_diff_is_other_minus_this(self, tiny_plan, tiny_signature):
        ax = tiny_plan.plot_diff(Plan.uniform(DENSE, tiny_signature, sink=4), 1024)
        np.testing.assert_allclose(ax.images[0].get_array(), 1 - np.array(tiny_plan.spans(1024)).T / 1024)
        assert ax.images[0].get_clim() == (-1, 1)

    def test_mask_is_the_rules(self, tiny_plan):
        shown = tiny_plan.plot_mask(2, 1, 300).images[0].get_array()
        rule = tiny_plan.rules[2][1]
        assert (shown == span_mask(rule, 300, sink=4, min_span=tiny_plan.min_span)).all()

    def test_mask_of_a_long_context_has_as_many_pixels_as_fit(self, tiny_plan):
        ax = tiny_plan.plot_mask(2, 1, 100_000)
        assert ax.images[0].get_array().shape == (512, 512)
        assert ax.images[0].get_extent() == [0, 100_000, 100_000, 0]
        share = np.tril(ax.images[0].get_array()).sum() / np.tri(512).sum()
        assert share == pytest.approx(
            Plan.uniform(tiny_plan.rules[2][1], tiny_plan.model).attention_density(100_000), abs=0.01
        )

    def test_mask_anchored_at_the_prompt_has_one_span(self, tiny_plan):
        plan = tiny_plan.model_copy(update={"anchor": "prompt"})
        span = plan.spans(300)[2][1]
        shown = plan.plot_mask(2, 1, 300).images[0].get_array()
        assert (shown == span_mask(SpanRule(span, 0), 300, sink=4, min_span=1)).all()

    def test_mask_of_a_native_layer_is_its_window_without_sink(self, native_plan):
        ax = native_plan.plot_mask(1, 0, 400)
        shown = ax.images[0].get_array()
        assert shown.sum(1).tolist() == [min(i + 1, 128) for i in range(400)]
        assert not shown[-1, 0]
        assert "own window, 128" in ax.get_title(loc="left")
        assert ax.images[0].get_cmap()(1.0) == to_rgba("dimgrey")

    @pytest.mark.parametrize(
        ("layer", "head", "n", "says"),
        [
            (3, 0, 9, "layer 3 .* 0 to 2"),
            (-1, 0, 9, "layer -1"),
            (0, 2, 9, "KV head 2 .* 0 to 1"),
            (0, 0, 0, "length 0"),
        ],
    )
    def test_mask_of_what_is_not_there(self, tiny_plan, layer, head, n, says):
        with pytest.raises(ConfigError, match=says):
            tiny_plan.plot_mask(layer, head, n)

    def test_density(self, tiny_plan):
        ax = tiny_plan.plot_density()
        kept, computed, budget = ax.lines
        lengths = kept.get_xdata()
        assert (lengths[0], lengths[-1]) == (64, 4096)
        np.testing.assert_allclose(kept.get_ydata(), [100 * tiny_plan.density(int(n)) for n in lengths])
        np.testing.assert_allclose(computed.get_ydata(), [100 * tiny_plan.attention_density(int(n)) for n in lengths])
        assert (budget.get_xdata().tolist(), budget.get_ydata().tolist()) == ([1024], [50])
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [
            "tokens kept",
            "prefill computed",
            "budget",
        ]

    def test_budgets_on_other_things_are_no_marks(self, tiny_plan):
        origin = Provenance(searcher="exact", budgets=(Budget(length=1024, asked="decode=1ms@1024"),))
        ax = tiny_plan.model_copy(update={"provenance": origin}).plot_density([1024, 512])
        assert len(ax.lines) == 2
        assert ax.lines[0].get_xdata().tolist() == [512, 1024]


class TestHtml:
    def test_every_cell_says_its_exact_rule(self, native_plan):
        text = native_plan._repr_html_()
        root = ElementTree.fromstring(text)
        cells = [element for element in root.iter() if element.tag.endswith("rect")]
        titles = [cell[0].text for cell in cells]
        assert titles == [title for layer in native_plan.cell_texts(4096) for title in layer]
        assert titles[0] == "layer 0, KV head 0: 300; 300 of 4096 tokens (7.3%)"
        assert titles[2] == "layer 1, KV head 0: own window, 128; 128 of 4096 tokens (3.1%)"
        assert "tabindex" not in text, "a notebook has stops enough"
        assert not re.search("https?://(?!www.w3.org/2000/svg)", text)

    def test_names_are_escaped(self, tiny_plan):
        model = tiny_plan.model.model_copy(update={"architecture": "<b>&"})
        text = tiny_plan.model_copy(update={"model": model})._repr_html_()
        assert "&lt;b&gt;&amp;" in text
        assert "<b>&" not in text
        ElementTree.fromstring(text)
