"""What is special about some tasks."""

import itertools

import numpy as np
import pytest
import torch

from moa_search.errors import CalibrationError
from moa_search.evaluation.scoring import score_item
from moa_search.tasks import TASKS

HALF = np.array([True, False, True, False])


def text_of(tiny_model, name, **options):
    (item,) = TASKS[name].held_out(tiny_model[1], **{"length": 900, "count": 1, "seed": 0, **options})
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
    monkeypatch.setattr("moa_search.tasks.lists.THINGS", ())
    monkeypatch.setattr("moa_search.tasks.lists.JOBS", ())
    monkeypatch.setattr("moa_search.tasks.lists.CITIES", ("Rome",))
    monkeypatch.setattr("moa_search.tasks.lists.NAMES", ())
    with pytest.raises(CalibrationError, match="they have 19 entries at most"):
        TASKS["lines"].held_out(tiny_model[1], length=3000, count=1, seed=0)


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
    (item,) = task.held_out(tokenizer, length=401, count=1, seed=0)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(item.ids)[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(item.ids[1:]), reduction="none")
    readings = score_item(model, task, item, "generated")
    assert [reading.depth for reading in readings] == [(slice_ + 0.5) / 8 for slice_ in range(8)]
    expected = losses.reshape(8, 50).mean(1)
    np.testing.assert_allclose([reading.nll for reading in readings], expected, rtol=1e-5)
