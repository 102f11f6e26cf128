"""The pages of plans, profiles, differences and fronts: what they say, and that they stand on their own."""

import dataclasses
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moa_search.errors import ConfigError, ModelMismatchError
from moa_search.formats import Plan
from moa_search.formats.provenance import Validation
from moa_search.inspection.frames.plans import layer_losses
from moa_search.inspection.pages import diff_page, front_page, plan_page, profile_page
from moa_search.inspection.pages.plan import representative_heads
from moa_search.inspection.quality import heaviest_heads
from moa_search.search import Front, SearchOptions, search_profile
from moa_search.spans import DENSE, SpanRule


class Elements(HTMLParser):
    """Every element with its attributes, and the text that follows its start tag."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page if isinstance(page, str) else page.render())

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))

    def handle_data(self, data):
        if self.found:
            self.found[-1][2].append(data)

    def all(self, *tags):
        return [(tag, attributes, "".join(words).strip()) for tag, attributes, words in self.found if tag in tags]

    @property
    def text(self):
        return " ".join("".join(words) for _, _, words in self.found)

    def cells(self):
        return [attributes for _, attributes, _ in self.all("rect") if "data-layer" in attributes]


@pytest.fixture
def front(tiny_profile, tmp_path):
    search_profile(tiny_profile, SearchOptions(density=[0.4], front_steps=2)).save(tmp_path)
    return Front.load(tmp_path)


@pytest.fixture
def make(request, tiny_plan, native_plan, tiny_profile, native_profile):
    other = Plan.uniform(SpanRule(300, 0), tiny_plan.model)

    def front():
        return request.getfixturevalue("front")  # a search, so only where it is needed

    return {
        "plan": lambda: plan_page(tiny_plan),
        "all of a plan": lambda: plan_page(
            front().plans[0], lengths=[512, 1024], heads=[(0, 0)], front=front(), profile=tiny_profile
        ),
        "native plan": lambda: plan_page(native_plan),
        "profile": lambda: profile_page(tiny_profile),
        "native profile": lambda: profile_page(native_profile, lengths=[512], heads=[(0, 1)], criterion="recall"),
        "diff": lambda: diff_page([tiny_plan, other], ["a & b", "<c>"]),
        "the same": lambda: diff_page([tiny_plan, tiny_plan], ["a", "b"]),
        "front": lambda: front_page(front()),
        "front without choice": lambda: front_page(dataclasses.replace(front(), chosen_index=None)),
    }


PAGES = (
    "plan",
    "all of a plan",
    "native plan",
    "profile",
    "native profile",
    "diff",
    "the same",
    "front",
    "front without choice",
)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_stands_on_its_own(make, name):
    """No network, no id twice, headings step by step, and one stop of the keyboard for each heat map."""
    text = make[name]().render()
    elements = Elements(text)
    linked = [attributes.get(link) for _, attributes, _ in elements.found for link in ("src", "href")]
    assert all(link is None or link.startswith(("#", "data:")) for link in linked)
    assert not re.search(r"https?:(?!//www\.w3\.org/)", text)
    places = [attributes["id"] for _, attributes, _ in elements.found if attributes.get("id")]
    assert len(places) == len(set(places))
    levels = [int(tag[1]) for tag, _, _ in elements.all("h1", "h2", "h3")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for drawn in text.split('<svg class="cells"')[1:]:
        assert re.findall(r'data-layer="(\d+)" data-head="(\d+)"[^>]* tabindex="0"', drawn) == [("0", "0")]


def test_every_cell_of_a_plan_says_its_exact_rule_twice(native_plan):
    elements = Elements(plan_page(native_plan, lengths=[512, 1024]))
    wanted = [text for n in (512, 1024) for layer in native_plan.cell_texts(n) for text in layer]
    cells = elements.cells()
    assert [cell["aria-label"] for cell in cells] == wanted
    assert [text for _, _, text in elements.all("title")[1:]] == wanted, "without scripts the browser shows these"
    for cell in cells:
        rule = native_plan.rule_text(int(cell["data-layer"]), int(cell["data-head"]))
        assert f": {rule}; " in cell["aria-label"]


def test_colours_go_with_the_share(tiny_signature):
    rules = [[DENSE, SpanRule(0, 0)], [SpanRule(512, 0)] * 2, [DENSE, DENSE]]
    cells = Elements(plan_page(Plan.from_rules(rules, tiny_signature), lengths=[1024])).cells()
    assert cells[0]["fill"] == "#fde725", "viridis' last"
    assert cells[1]["fill"] not in (cells[0]["fill"], cells[2]["fill"])
    assert cells[2]["fill"] == cells[3]["fill"]


def test_sections_of_a_plan(make, front):
    full = Elements(make["all of a plan"]())
    titles = [text for _, _, text in full.all("h2")]
    assert titles == ["Spans", "Density against length", "Cost per layer", "Masks", "Front", "Provenance"]
    assert [text for _, _, text in Elements(make["plan"]()).all("h2")].count("Front") == 0
    plan = front.plans[0]
    assert plan.checksum in full.text
    assert "00 (plan.json)" in full.text
    assert "predicted loss @512" in full.text
    assert f"layer 0, KV head 0: {plan.rule_text(0, 0)}; " in full.text


def test_validated_losses_are_told(tiny_plan):
    entry = Validation(length=2048, data="sha256:1", samples=9, loss=1.25, loss_error=0.5, dense_loss=1.0)
    text = Elements(plan_page(tiny_plan.model_copy(update={"validated": (entry,)}))).text
    assert "1.2500 ± 0.5000" in text
    assert "1.0000" in text


def test_layers_lose_what_the_search_predicted(front, tiny_profile):
    plan = front.plans[0]
    for metrics in (m for m in plan.predicted if not m.extrapolated):
        per_layer = layer_losses(plan, tiny_profile)[metrics.length]
        assert per_layer.shape == (3,)
        assert per_layer.sum() == pytest.approx(metrics.loss)


def test_native_layers_lose_nothing(native_plan, native_profile):
    for per_layer in layer_losses(native_plan.model_copy(update={"sink": 4, "block": 64}), native_profile).values():
        assert per_layer[1] == 0


def test_a_profile_of_something_else(tiny_plan, native_profile, tiny_profile):
    with pytest.raises(ModelMismatchError, match="another model"):
        plan_page(tiny_plan, profile=native_profile)
    with pytest.raises(ConfigError, match="block 64, the plan has 32"):
        plan_page(tiny_plan, profile=tiny_profile)


def test_heads_whose_masks_are_shown(tiny_plan):
    spans = np.array(tiny_plan.spans(1024))
    heads = representative_heads(tiny_plan, 1024)
    shown = [int(spans[head]) for head in heads]
    assert shown == sorted(shown, reverse=True)
    assert (shown[0], shown[-1]) == (spans.max(), spans.min())
    assert len({tiny_plan.rule_text(*head) for head in heads}) == len(heads) == 4
    with pytest.raises(ConfigError, match="layer 3 is out of range"):
        plan_page(tiny_plan, heads=[(3, 0)])


def test_a_profile_shows_what_loses_most(tiny_profile):
    losses, _, _ = tiny_profile.influence(1024)
    first, *_ = heaviest_heads(tiny_profile, 1024, "signed", 4)
    assert losses[first] == losses.max()
    elements = Elements(profile_page(tiny_profile))
    assert f"layer {first[0]}, KV head {first[1]}" in elements.text
    texts = {cell["aria-label"] for cell in elements.cells()}
    assert f"layer {first[0]}, KV head {first[1]}: {losses.max():.3g}" in texts
    assert tiny_profile.checksum in elements.text


def test_native_heads_are_never_among_those_that_lose_most(native_profile):
    assert {layer for layer, _ in heaviest_heads(native_profile, 1024, "signed", 99)} == {0, 2}
    assert len(heaviest_heads(native_profile, 1024, "signed", 99)) == 4


def test_heads_that_were_not_profiled(native_profile):
    with pytest.raises(ConfigError, match="layer 1 has a sliding window of its own"):
        profile_page(native_profile, heads=[(1, 0)])
    with pytest.raises(ConfigError, match="KV head 2 is out of range"):
        profile_page(native_profile, heads=[(0, 2)])


def test_a_difference_says_both_rules(tiny_plan):
    rules = [list(layer) for layer in tiny_plan.rules]
    rules[2][1] = SpanRule(300, 0)
    other = Plan.from_rules(rules, tiny_plan.model, sink=tiny_plan.sink)
    elements = Elements(diff_page([tiny_plan, other], ["old", "new"], lengths=[1024]))
    assert "1 of 6 KV heads differ" in elements.text
    span = tiny_plan.spans(1024)[2][1]
    labels = [cell["aria-label"] for cell in elements.cells()]
    assert labels[-1] == f"layer 2, KV head 1: 0.78125n-96 to 300; {span} to 300 of 1024 tokens"
    assert "1 heads at 1024 tokens" in elements.text
    assert "rule, old" in elements.text


def test_plans_that_act_the_same(make):
    text = Elements(make["the same"]()).text
    assert "the plans act the same" in text
    assert "No head differs at 1024 tokens" in text


def test_names_are_escaped(make):
    text = make["diff"]().render()
    assert "&lt;c&gt;" in text
    assert "<c>" not in text


def test_a_front_says_what_is_extrapolated(front):
    assert front.plans[0].predicted[-1].extrapolated
    text = front_page(front).render()
    assert "~ is extrapolated" in text
    assert "predicted loss at 1024 tokens" in text
    assert "predicted loss at 2048 tokens" not in text, "the chart keeps to what was profiled"


def test_a_front_marks_the_chosen_plan(make):
    assert "a ring around the chosen one" in make["front"]().render()
    assert "00 (plan.json)" in Elements(make["front"]()).text
    without = Elements(make["front without choice"]()).text
    assert "holds no plan.json" in without
    assert "(plan.json)" not in without
