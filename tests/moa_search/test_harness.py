"""lm-evaluation-harness on a model dense and under plans, offline with local tasks."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoTokenizer

from moa_search import api, load_model
from moa_search.cli import evaluate
from moa_search.errors import BackendUnavailableError, ConfigError
from moa_search.evaluation.harness import HarnessRun, harness_summary
from moa_search.formats import ModelSignature, Plan
from moa_search.spans import DENSE, SpanRule

EXAMPLES = Path(__file__).parents[2] / "configs" / "eval" / "lm-eval"


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """The tiny model with a token that ends texts, which the harness needs."""
    target = tmp_path_factory.mktemp("harness") / "model"
    shutil.copytree(tiny_model_dir, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.eos_token = "Ā"  # the byte 0
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def signature(loaded):
    return ModelSignature.of(loaded[0].config)


@pytest.fixture
def local(tmp_path):
    """A folder with a task of long questions with two choices, and one that generates."""
    rows = [
        {"question": f"{'stone ' * 60}number {number}", "choices": ["red", "blue"], "right": number % 2}
        for number in range(6)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    common = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        'doc_to_text: "{{question}}"\n'
    )
    (tmp_path / "stones.yaml").write_text(
        f"task: stones\n{common}output_type: multiple_choice\n"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{right}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "saying.yaml").write_text(
        f"task: saying\n{common}output_type: generate_until\n"
        'doc_to_target: "{{choices[right]}}"\n'
        'generation_kwargs:\n  until: ["!"]\n  max_gen_toks: 3\n  do_sample: false\n'
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return str(tmp_path)


def test_dense_and_plans_on_the_same_samples_with_their_logs(loaded, signature, local, tmp_path):
    plans = {"short": Plan.uniform(SpanRule(80, 0), signature), "all": Plan.uniform(DENSE, signature)}
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.json")
    summary = api.run_harness(
        loaded, tasks=["stones", "saying"], include_path=local, limit=4, output=str(tmp_path / "out"),
        plan=[str(tmp_path / f"{name}.json") for name in plans], baselines=["dense", "uniform"], length=300,
    )  # fmt: skip
    names = ["dense", "uniform like short", "short", "uniform like all", "all"]
    assert summary["variant"].unique().tolist() == names
    assert set(zip(summary["task"], summary["metric"], strict=True)) == {("stones", "acc"), ("saying", "exact_match")}
    assert set(summary["n"]) == {4}
    by = summary.set_index(["task", "variant"])
    for task in ("stones", "saying"):
        assert by.loc[(task, "all"), "value"] == by.loc[(task, "dense"), "value"]
        assert by.loc[(task, "all"), "difference"] == 0
        assert pd.isna(by.loc[(task, "dense"), "difference"])
    out = tmp_path / "out"
    assert len(pd.read_csv(out / "results.csv")) == len(summary)
    assert len(pd.read_csv(out / "items.csv")) == 4 * len(summary)
    logs = {
        name: [json.loads(line) for line in (out / "samples" / name / "stones.jsonl").read_text().splitlines()]
        for name in ("dense", "short", "all")
    }
    assert [sample["doc_id"] for sample in logs["short"]] == [0, 1, 2, 3]
    likelihoods = {name: [sample["resps"] for sample in samples] for name, samples in logs.items()}
    assert likelihoods["short"] != likelihoods["dense"], "the plan took effect"
    assert loaded[0].config._attn_implementation != "moa", "and is off again"


def test_differences_are_paired_sample_by_sample():
    def run(*values):
        key = {"task": "t", "filter": "none", "metric": "acc"}
        items = pd.DataFrame([{**key, "item": item, "value": value} for item, value in enumerate(values)])
        total = {**key, "value": sum(values) / len(values), "stderr": 0.1}
        return HarnessRun(pd.DataFrame([total]), items, {})

    table = harness_summary({"dense": run(1.0, 0.0, 1.0), "plan": run(0.0, 0.0, 1.0)}).set_index("variant")
    assert table.loc["plan", "difference"] == pytest.approx(-1 / 3)
    assert table.loc["plan", "difference_low"] == -1
    assert table.loc["plan", "difference_high"] == 0
    assert harness_summary({"plan": run(1.0)})["difference"].isna().all()


def test_the_examples_run_as_a_user_runs_them(monkeypatch, capsys, folder, tmp_path):
    """The tiny model knows no capitals; what counts is that both kinds of task run, at the length asked for."""
    monkeypatch.chdir(EXAMPLES.parents[2])
    monkeypatch.setattr(
        sys, "argv",
        ["moa-eval", "lm-eval", "--model", str(folder), "--tasks", "capitals", "long_passkey", "--include-path",
         "configs/eval/lm-eval", "--limit", "2", "--lengths", "400", "--output", str(tmp_path / "out")],
    )  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "capitals" in out
    assert "exact_match (number)" in out
    (sample, *_) = (tmp_path / "out" / "samples" / "dense" / "long_passkey.jsonl").read_text().splitlines()
    logged = json.loads(sample)
    assert len(logged["doc"]["prompt"]) == pytest.approx(400, abs=10)
    assert logged["doc"]["answer"].isdigit()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": ["stone"]}, r"knows no task 'stone' \(did you mean 'stones'\?\); its own tasks need --builtin true"),
        ({"tasks": []}, "no task is named; choose from saying, stones"),
        ({"baselines": ["uniform"]}, "give --plan"),
        ({"baselines": []}, "nothing to evaluate"),
        ({"limit": 0}, "limit: 0 is out of range"),
    ],
)
def test_bad_input(loaded, local, options, words):
    with pytest.raises(ConfigError, match=words):
        api.run_harness(loaded, **{"tasks": ["stones"], "include_path": local, **options})


def test_a_tokenizer_without_an_end_is_refused(tiny_model_dir, local):
    with pytest.raises(ConfigError, match="no end-of-text token"):
        api.run_harness(str(tiny_model_dir), tasks=["stones"], include_path=local)


def test_uniform_spans_need_a_length(loaded, signature, local):
    plan = Plan.uniform(SpanRule(80, 0), signature)
    with pytest.raises(ConfigError, match="give --length"):
        api.run_harness(loaded, tasks=["stones"], include_path=local, plan=[plan], baselines=["uniform"])


def test_data_that_is_missing_is_one_line(loaded, local, tmp_path):
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match="lm-eval can't run stones"):
        api.run_harness(loaded, tasks=["stones"], include_path=local)


def test_without_the_harness(loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'moa-search\[eval\]'"):
        api.run_harness(loaded, tasks=["any"])
