"""Several questions on one cache."""

import numpy as np

from moa_search.evaluation.rivals.exchange import item_of
from moa_search.evaluation.scoring import score_answer, score_item
from moa_search.tasks import TASKS

TURNS = TASKS["turns"]


def test_each_turn_asks_for_another_person_s_key(tiny_model):
    tokenizer = tiny_model[1]
    (sample,) = TURNS.held_out(tokenizer, length=1500, count=1, seed=0)
    prompt, answer = tokenizer.decode(sample.prompt), tokenizer.decode(sample.answer)
    names = [part.split("?")[0] for part in (prompt[-60:] + answer).split("What is the pass key of ")[1:]]
    keys = tokenizer.decode(sample.answer[sample.supervised]).split()
    assert len(set(names)) == len(set(keys)) == 4
    for name, key in zip(names, keys, strict=True):
        assert f"The pass key of {name} is {key}. " in prompt
        assert f" The pass key of {name} is {key}" in (prompt[-60:] + answer)
    assert "What is" not in tokenizer.decode(item_of(sample, generated=False)["context"])


def test_a_reading_for_each_turn(tiny_model):
    (sample,) = TURNS.held_out(tiny_model[1], length=1500, count=1, seed=0)
    readings = score_item(tiny_model[0], TURNS, sample, "generated")  # teacher-forced whatever is asked for
    losses = score_answer(tiny_model[0], sample).losses
    assert len(readings) == 4
    assert np.allclose([reading.nll for reading in readings], losses.reshape(4, -1).mean(1))
