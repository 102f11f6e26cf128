"""What is special about some tasks."""

import itertools
import json

import numpy as np
import pytest
import torch

from moa_search.errors import CalibrationError, ConfigError
from moa_search.evaluation import TASKS
from moa_search.evaluation.tasks import require_tasks
from moa_search.evaluation.tasks.text_scores import TEXT_SCORES, words_of

HALF = np.array([True, False, True, False])


def text_of(tiny_model, name, **options):
    (item,) = TASKS[name].build(tiny_model[1], **{"length": 900, "count": 1, "seed": 0, **options})
    return tiny_model[1].decode(item.prompt), tiny_model[1].decode(item.answer), item


@pytest.mark.parametrize("name", ["passkey", "multikey", "lines", "lookup"])
def test_a_key_counts_only_as_a_whole(name):
    assert TASKS[name].score(HALF) == 0


@pytest.mark.parametrize("name", ["copy", "tracking", "perplexity"])
def test_longer_answers_count_by_token(name):
    assert TASKS[name].score(HALF) == 0.5


@pytest.mark.parametrize(("name", "entry"), [("lines", "\nLine "), ("lookup", '": "')])
def test_lists_are_full_of_entries_of_which_one_is_asked_for(name, entry, tiny_model):
    prompt, answer, item = text_of(tiny_model, name, length=1500, depths=[0.5])
    assert prompt.count(entry) > 15
    asked = prompt.rpartition("\n")[2].strip()
    assert prompt.count(f"{asked}{answer}") == 1, "the entry, with the value that is the answer"
    assert abs(prompt.index(f"{asked}{answer}") / len(prompt) - 0.5) < 0.1
    assert item.length == 1500


def test_a_list_can_run_out_of_entries(tiny_model, monkeypatch):
    monkeypatch.setattr("moa_search.evaluation.tasks.lines.THINGS", ())
    monkeypatch.setattr("moa_search.evaluation.tasks.lines.JOBS", ())
    monkeypatch.setattr("moa_search.evaluation.tasks.lines.CITIES", ("Rome",))
    monkeypatch.setattr("moa_search.evaluation.tasks.lines.NAMES", ())
    with pytest.raises(CalibrationError, match="they have 19 entries at most"):
        TASKS["lines"].build(tiny_model[1], length=3000, count=1, seed=0)


def test_a_chain_of_variables_holds_one_number(tiny_model):
    prompt, answer, _ = text_of(tiny_model, "tracking", length=1500, depths=[0.0])
    names = answer.split()
    assert len(set(names)) == 5
    value = prompt.rpartition("the value ")[2].rstrip(":")
    places = [prompt.index(f"VAR {names[0]} = {value}\n")]
    places += [prompt.index(f"VAR {name} = VAR {source}\n") for source, name in itertools.pairwise(names)]
    assert places == sorted(places)


def test_perplexity_reads_every_token_of_a_document_by_position(tiny_model):
    model, tokenizer = tiny_model
    task = TASKS["perplexity"]
    (item,) = task.build(tokenizer, length=401, count=1, seed=0)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(item.ids)[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(item.ids[1:]), reduction="none")
    readings = task.measure(model, tokenizer, item, "generated")
    assert [reading.depth for reading in readings] == [(slice_ + 0.5) / 8 for slice_ in range(8)]
    expected = losses.reshape(8, 50).mean(1)
    np.testing.assert_allclose([reading.nll for reading in readings], expected, rtol=1e-5)


class TestLongBench:
    @pytest.fixture
    def write(self, tmp_path):
        def write(*records):
            rows = [
                {"context": "stones " * 300, "input": "Which?", "answers": ["red", "crimson red"], "dataset": "qasper"}
                | record
                for record in records
            ]
            path = tmp_path / "records.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
            return f"longbench:{path}"

        return write

    def test_a_long_context_loses_its_middle_and_a_short_one_stays_short(self, write, tiny_model):
        long, short = {"context": "start " + "x" * 3000 + " finish"}, {"context": "brief"}
        (task,) = require_tasks([write(long, short)])
        items = task.build(tiny_model[1], length=700, count=2, seed=0)
        texts = sorted((tiny_model[1].decode(item.prompt) for item in items), key=len)
        assert texts[0] == "brief\n\nQuestion: Which?\nAnswer:"
        assert texts[1].startswith("start x")
        assert texts[1].endswith(" finish\n\nQuestion: Which?\nAnswer:")
        assert max(len(item.prompt) for item in items) == 700 - 128, "room for 128 tokens of answer"

    def test_the_best_accepted_answer_counts(self, write, tiny_model, monkeypatch):
        (task,) = require_tasks([write({})])
        (item,) = task.build(tiny_model[1], length=700, count=1, seed=0)
        said = tiny_model[1](" It is crimson red.")["input_ids"]
        monkeypatch.setattr("moa_search.evaluation.tasks.longbench.generate_tokens", lambda *options: np.array(said))
        (reading,) = task.measure(*tiny_model, item, "generated")
        assert reading.score == pytest.approx(2 * 2 / (4 + 2))

    def test_forced_answers_are_the_first_accepted_ones(self, write, tiny_model):
        (task,) = require_tasks([write({})])
        (item,) = task.build(tiny_model[1], length=700, count=1, seed=0)
        assert tiny_model[1].decode(item.answer) == " red"

    def test_tables_say_what_a_score_is(self, write):
        (task,) = require_tasks([write({})])
        assert (task.metric_of("generated"), task.metric_of("forced")) == ("F1", "token accuracy")

    def test_each_data_set_has_its_measure(self, write):
        for dataset, metric in {"trec": "class named", "lcc_e": "edit similarity", "gov_report": "ROUGE-L",
                                "passage_count": "number named", "mine": "F1"}.items():  # fmt: skip
            assert require_tasks([write({"dataset": dataset})])[0].metric == metric

    @pytest.mark.parametrize(
        ("record", "words"),
        [
            ({"context": 3}, "line 2: no record of LongBench, it has no text 'context'"),
            ({"input": None}, "line 2: no record of LongBench, it has no text 'input'"),
            ({"answers": []}, "line 2: no record of LongBench, its 'answers'"),
            ({"dataset": "trec"}, "of several data sets"),
        ],
    )
    def test_broken_records_are_named(self, write, record, words):
        with pytest.raises(ConfigError, match=words):
            require_tasks([write({}, record)])

    def test_files_that_hold_none(self, tmp_path):
        with pytest.raises(ConfigError, match="can't be read"):
            require_tasks([f"longbench:{tmp_path / 'none.jsonl'}"])
        (tmp_path / "text.jsonl").write_text("{not json")
        with pytest.raises(ConfigError, match="line 1: no JSON"):
            require_tasks([f"longbench:{tmp_path / 'text.jsonl'}"])

    def test_more_items_than_records(self, write, tiny_model):
        (task,) = require_tasks([write({})])
        with pytest.raises(ConfigError, match="has 1 records, 2 are asked for"):
            task.build(tiny_model[1], length=700, count=2, seed=0)


@pytest.mark.parametrize(
    ("metric", "given", "wanted", "score"),
    [
        ("F1", "The big, red fox.", "a red fox", 2 * 2 / (3 + 2)),
        ("F1", "nothing", "red", 0),
        ("F1", "北京是", "北京", 2 * 2 / (3 + 2)),
        ("ROUGE-L", "one two three four", "one three five", 2 * 2 / (4 + 3)),
        ("ROUGE-L", "", "one", 0),
        ("class named", "It is a city", "city", 1),
        ("class named", "a city or a state", "city", 0.5),
        ("class named", "a state", "city", 0),
        ("class named", "Other location", "Other location", 1),
        ("number named", "Paragraph 3, not 13", "Paragraph 3", 0.5),
        ("number named", "none", "Paragraph 3", 0),
        ("edit similarity", "\n# a comment\nreturn x", "return x", 1),
        ("edit similarity", "", "return x", 0),
    ],
)
def test_text_scores(metric, given, wanted, score):
    classes = ["city", "state", "Other location", "location"]
    assert TEXT_SCORES[metric](given, wanted, classes) == pytest.approx(score)


def test_words_of_languages_that_write_no_spaces():
    assert words_of("The 東京 tower") == ["東", "京", "tower"]
