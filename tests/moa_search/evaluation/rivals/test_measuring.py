"""Rivals that run in another environment."""

import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from moa_search.errors import ConfigError, FileFormatError, MoAError
from moa_search.evaluation.compare import Variant
from moa_search.evaluation.rivals import Elsewhere, parse_rivals, worker
from moa_search.evaluation.rivals.exchange import item_of, read_answers
from moa_search.evaluation.rivals.worker.guessing import guessing
from moa_search.evaluation.rivals.worker.reading import Read
from moa_search.evaluation.suite import Evaluator, Grid, measure_grid
from moa_search.tasks import TASKS

GRID = Grid({300: 2})
TWO = [TASKS["passkey"], TASKS["copy"]]


RIVALS = parse_rivals(["snapkv@0.25"])


@pytest.fixture(scope="module")
def evaluator(tiny_model):
    return Evaluator(*tiny_model)


@pytest.fixture(scope="module")
def dense(evaluator):
    return measure_grid(evaluator, [Variant("dense", lambda length: None)], TWO, GRID)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, tiny_model_dir, other_python):
    folder = tmp_path_factory.mktemp("report") / "rivals"
    return Elsewhere(other_python, str(tiny_model_dir), folder, ("unknown", "known"))


@pytest.fixture(scope="module")
def rows(elsewhere, evaluator, dense):
    return elsewhere.rows(RIVALS, evaluator, TWO, GRID, dense)


def test_rows_stand_beside_those_of_plans(rows, dense):
    names = ["full", "snapkv@0.25", "snapkv@0.25, question known"]
    assert list(dict.fromkeys(rows["variant"])) == names
    assert set(rows.columns) == set(dense.columns)
    full = rows[rows["variant"] == "full"]
    np.testing.assert_allclose(full["nll"].to_numpy(float), dense["nll"].to_numpy(float), atol=1e-3)
    assert full["score"].tolist() == dense["score"].tolist()
    assert (full[["density", "kv_share", "kv_peak"]] == 1).all(axis=None)
    for name in names[1:]:
        compressed = rows[rows["variant"] == name]
        assert (abs(compressed["kv_share"] - 0.25) < 0.01).all()
        assert (abs(compressed["kv_peak"] - 0.625) < 0.01).all(), "the second of two layers is whole beside the first"
        assert (abs(compressed["nll"].to_numpy(float) - dense["nll"].to_numpy(float)) > 1e-6).all()
    assert not np.array_equal(*(rows[rows["variant"] == name]["nll"] for name in names[1:]))


def test_what_was_answered_is_not_asked_again(elsewhere, evaluator, dense, rows):
    (answers,) = elsewhere.folder.glob("answers-*.jsonl")
    lines = answers.read_text()
    pd.testing.assert_frame_equal(elsewhere.rows(RIVALS, evaluator, TWO, GRID, dense), rows)
    assert answers.read_text() == lines
    answers.write_text(lines[:-40])  # stopped in the middle of a line
    pd.testing.assert_frame_equal(elsewhere.rows(RIVALS, evaluator, TWO, GRID, dense), rows)
    assert answers.read_text().startswith(lines[: lines[:-1].rindex("\n") + 1])


def test_another_model_there_is_no_comparison(elsewhere, evaluator, dense, rows):
    with pytest.raises(MoAError, match="both must compute the same model"):
        elsewhere.rows(RIVALS, evaluator, TWO, GRID, dense.assign(nll=dense["nll"] + 1))


def test_generated_answers_are_those_of_greedy_decoding(elsewhere, evaluator):
    grid = Grid({300: 1}, answers="generated")
    dense = measure_grid(evaluator, [Variant("dense", lambda length: None)], TWO, grid)
    rows = elsewhere.rows(parse_rivals(["snapkv@0.5"]), evaluator, TWO, grid, dense)
    assert rows[rows["variant"] == "full"]["score"].tolist() == dense["score"].tolist()
    assert rows["nll"].isna().all()


def test_items_without_a_context_are_refused(elsewhere, evaluator, dense):
    with pytest.raises(ConfigError, match="perplexity, whose items have none"):
        elsewhere.rows(parse_rivals(["snapkv@0.5"]), evaluator, [TASKS["perplexity"]], GRID, dense)


@pytest.mark.parametrize(
    ("python", "words"),
    [(sys.executable, "has no kvpress; install it there"), ("/no/python", "can't be run")],
)
def test_an_environment_that_lacks_kvpress_is_told(
    python, words, tmp_path, tiny_model_dir, evaluator, dense, monkeypatch
):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    there = Elsewhere(python, str(tiny_model_dir), tmp_path / "rivals", ("unknown",))
    with pytest.raises(ConfigError, match=words):
        there.rows(parse_rivals(["snapkv@0.5"]), evaluator, TWO, GRID, dense)


def test_what_fails_there_is_one_line(elsewhere, evaluator, dense):
    with pytest.raises(MoAError, match="has no attribute 'TOVAPress'"):
        elsewhere.rows(parse_rivals(["tova@0.5"]), evaluator, TWO, GRID, dense)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("int3", "did you mean 'int8'"),
        ("int4@0.5", "keeps all tokens; write int4"),
        ("snapkv", "such as snapkv@0.25"),
        ("kvzip@1.5", "over 0 and below 1"),
        ("kvzip@x", "over 0 and below 1"),
        ("full", "is unknown"),
    ],
)
def test_names_that_are_none_are_refused(typed, words):
    with pytest.raises(ConfigError, match=words):
        parse_rivals([typed])


def test_every_name_of_the_worker_is_a_rival():
    typed = [f"{name}@0.5" if name in worker.COMPRESSORS else name for name in worker.NAMES if name != "full"]
    assert [rival.name for rival in parse_rivals([*typed, *typed])] == list(worker.NAMES[1:])


def test_scores_that_methods_have_in_common_are_worked_out_once(tiny_model):
    network, found = tiny_model[0], []
    read = Read(network, list(range(40)))

    def score(module):
        found.append(module.layer_idx)
        return torch.ones(3)

    for name, share in [("tova", 0.25), ("tova", 0.125), ("compactor", 0.25), ("compactor", 0.125)]:
        for layer in network.model.layers:
            scores = read.scored_once(name, share, score)(layer.self_attn)
            assert scores.tolist() == [1, 1, 1]
            scores.zero_()  # as AdaKV writes into them
    layers = list(range(len(network.model.layers)))
    assert found == layers * 3, "Compactor's depend on the share"
    assert read.spared_s >= 0


def test_a_key_that_no_query_sees_is_guessed_without_looking(monkeypatch):
    def search(queries):
        raise AssertionError("kvpress's own search looks in every round")

    patch = types.ModuleType("kvpress.attention_patch")
    patch.search_hyperplane = search
    monkeypatch.setitem(sys.modules, patch.__name__, patch)
    alike, apart = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [-1.0, 0.5]]])
    with guessing() as failed:
        key = patch.search_hyperplane(alike)
        patch.search_hyperplane(apart)
    assert (torch.bmm(alike, key[..., None]) < -1e4).all()
    assert list(map(bool, failed)) == [False, True]
    assert patch.search_hyperplane is search


STANDS_ALONE = """
import importlib, pkgutil, sys
sys.path.append(sys.argv[1])
sys.modules |= {"moa_search": None, "kvpress": None, "optimum": None}  # importing any of them is an error
import worker.command
assert "torch" not in sys.modules, "which takes seconds, and all may be answered already"
print(*(importlib.import_module(found.name).__name__ for found in pkgutil.iter_modules(worker.__path__, "worker.")))
"""


def test_the_worker_stands_alone():
    """The other environment has no moa_search, nor need it have what only some methods use."""
    (folder,) = worker.__path__
    command = [sys.executable, "-I", "-c", STANDS_ALONE, str(Path(folder).parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not found.returncode, found.stderr
    assert {"worker.__main__", "worker.methods"} <= set(found.stdout.split())


@pytest.mark.parametrize("name", ["passkey", "copy", "lines", "question", "tracking"])
def test_an_item_is_split_where_its_question_begins(name, tiny_model):
    tokenizer = tiny_model[1]
    (sample,) = TASKS[name].held_out(tokenizer, length=800, count=1, seed=0)
    item = item_of(sample, generated=False)
    assert item["context"] + item["question"] + item["answer"] == sample.ids.tolist()
    question = tokenizer.decode(item["question"])
    assert question.startswith("\n\n")
    assert "\n\n" not in question[2:], "nothing but the question"
    assert len(item["context"]) > 300


@pytest.mark.parametrize("line", ["", "{}", "[]", '{"schema": "moa-answers/9"}', '{"schema": "moa-ans'])
def test_files_that_hold_no_answers_are_refused(tmp_path, line):
    (tmp_path / "answers.jsonl").write_text(f"{line}\n")
    with pytest.raises(FileFormatError, match="line 1 is no answer"):
        read_answers(tmp_path / "answers.jsonl")


def test_an_item_names_what_it_holds(tiny_model):
    samples = TASKS["passkey"].held_out(tiny_model[1], length=300, count=2, seed=0)
    names = {item_of(sample, generated=generated)["id"] for sample in samples for generated in (False, True)}
    assert len(names) == 4
    assert json.loads(json.dumps(item_of(samples[0], generated=True)))["generate"] == samples[0].answer_tokens
