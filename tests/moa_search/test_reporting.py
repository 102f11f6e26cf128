"""A whole report, from a YAML file to its page."""

import re
import sys

import pandas as pd
import pytest
import yaml

from moa_search import api, load_model
from moa_search.api.variants import searched_plans
from moa_search.cli import evaluate
from moa_search.formats import ModelSignature, Plan
from moa_search.options import ReportOptions
from moa_search.spans import SpanRule


@pytest.fixture(scope="module")
def profile(tmp_path_factory, tiny_model_dir):
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    api.profile_model(
        str(tiny_model_dir), lengths=[300], samples=2, answers="dataset", output=str(path), dtype="float32"
    )
    return path


@pytest.fixture
def config(tmp_path, tiny_model_dir, profile):
    """A YAML file for everything at once, small."""
    signature = ModelSignature.of(load_model(str(tiny_model_dir))[0].config)
    Plan.uniform(SpanRule(100, 0), signature).save(tmp_path / "mine.json")
    content = {
        "model": str(tiny_model_dir),
        "dtype": "float32",
        "device": "cpu",
        "plan": [str(tmp_path / "mine.json")],
        "profile": str(profile),
        "searchers": ["exact", "moa"],
        "densities": [0.5],
        "budget_lengths": [300, 500],
        "tasks": ["passkey", "perplexity"],
        "lengths": [300, 500],
        "samples": [2, 1],
        "depths": [0.25, 0.75],
        "refine": 1,
        "output": str(tmp_path / "out"),
    }

    def write(**changes):
        path = tmp_path / "report.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}))
        return path

    return write


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moa-eval", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_from_a_yaml_file_to_a_page_and_its_tables(config, monkeypatch, capsys, tmp_path):
    status, out, err = run(monkeypatch, capsys, config())
    assert status == 0, err
    assert "report.html is the page" in out
    folder = tmp_path / "out"
    names = ["dense", "uniform like mine", "mine", "uniform like exact @ 0.5", "exact @ 0.5", "moa @ 0.5"]
    summary, items = pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "items.csv")
    assert summary["variant"].unique().tolist() == names
    at = summary[(summary["task"] == "passkey") & (summary["variant"] == "dense")].set_index("length")
    assert at["n"].to_dict() == {300: 4, 500: 2}, "so many at each of two depths"
    assert set(items["depth"][items["task"] == "passkey"]) == {0.25, 0.75}
    differences = pd.read_csv(folder / "differences.csv")
    assert set(differences[differences["against"] == "dense"]["variant"]) == set(names[1:])
    rivals = differences[differences["against"] != "dense"][["variant", "against"]].drop_duplicates()
    assert rivals.to_numpy().tolist() == [
        ["mine", "uniform like mine"], ["exact @ 0.5", "uniform like exact @ 0.5"], ["exact @ 0.5", "moa @ 0.5"],
    ]  # fmt: skip
    effective = pd.read_csv(folder / "effective.csv")
    assert effective["variant"].tolist() == names
    searched = sorted(path.name for path in (folder / "plans").glob("*/*.json"))
    assert searched == ["exact @ 0.5.json", "moa @ 0.5.json"]
    kept = summary[summary["variant"].isin(["exact @ 0.5", "moa @ 0.5"])]
    assert (kept["density"] <= 0.5).all(), "at every length of the budget"
    page = (folder / "report.html").read_text()
    for name in (*names, "Effective context", "Scores: passkey", "Differences", "Plans", "teacher-forced"):
        assert name in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)


def test_plans_are_searched_for_shares_of_bytes_too(profile, tmp_path):
    asked = ReportOptions(output=str(tmp_path), profile=str(profile), searchers=["exact"], kv_shares=[0.5])
    (group,) = searched_plans(asked)
    (name,) = group
    assert name == "exact @ 0.5 of bytes"
    assert group[name].share(300) <= 0.5
    both = searched_plans(asked.replace(densities=[0.25]))
    assert [name for group in both for name in group] == ["exact @ 0.25", "exact @ 0.5 of bytes"]


def test_a_second_run_measures_and_searches_nothing(config, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, capsys, config())[0] == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.csv")}

    def fails(*arguments, **options):
        raise AssertionError("something was done again")

    monkeypatch.setattr("moa_search.evaluation.suite.measure", fails)
    monkeypatch.setattr("moa_search.api.searching.search_plan", fails)
    assert run(monkeypatch, capsys, config())[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.csv")} == first


def test_a_flag_beats_the_file(config, monkeypatch, capsys, tmp_path):
    path = config(profile=None, tasks=["copy"])
    status, _, err = run(monkeypatch, capsys, path, "--lengths", 300, "--samples", 1, "--baselines", "dense")
    assert status == 0, err
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary[["variant", "length"]].to_numpy().tolist() == [["dense", 300], ["mine", 300]]
    assert "Effective context" not in (tmp_path / "out" / "report.html").read_text(), "copies are no retrieval"


def test_plans_alone_are_compared_with_nothing(config, monkeypatch, capsys, tmp_path):
    path = config(profile=None, tasks=["copy"], samples=[1, 1], windows=False, refine=0)
    status, _, err = run(monkeypatch, capsys, path, "--baselines", "none")
    assert status == 0, err
    assert set(pd.read_csv(tmp_path / "out" / "summary.csv")["variant"]) == {"mine"}
    assert pd.read_csv(tmp_path / "out" / "differences.csv").empty
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Scores: copy" in page
    assert "Differences" not in page


def test_rivals_stand_in_the_tables(config, monkeypatch, capsys, tmp_path):
    path = config(profile=None, rivals=["int4"], against=["int4"], windows=False, refine=0)
    status, _, err = run(monkeypatch, capsys, path)
    assert status == 0, err
    summary = pd.read_csv(tmp_path / "out" / "summary.csv").set_index("variant")
    assert (summary.loc["int4", "kv_share"] == (4 + 4) / 16).all(), "8 numbers of a head, and a scale"
    assert (summary.loc["int4", "density"] == 1).all()
    differences = pd.read_csv(tmp_path / "out" / "differences.csv")
    assert "int4" in set(differences["against"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(name in page for name in ("int4", "bytes kept"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": [1, 2, 3]}, "samples: 3 numbers for 2 lengths"),
        ({"against": ["dens"]}, "against: variant 'dens' isn't measured; choose from dense"),
        ({"depths": [1.5]}, "depths: 1.5 is out of range"),
        ({"refine": -1}, "refine: -1 is out of range"),
        ({"baselines": ["unifrom"]}, "did you mean 'uniform'"),
        ({"baselines": ["none", "dense"]}, "choose from dense, uniform, or none alone"),
        ({"baselines": "none", "against": ["dense"]}, "against: variant 'dense' isn't measured"),
        ({"tasks": ["paskey"]}, "did you mean 'passkey'"),
        ({"plan": [], "profile": None}, "give --plan"),
        ({"plan": [], "profile": None, "baselines": []}, "nothing to evaluate"),
        ({"searchers": []}, "nothing to search for"),
        ({"lengths": [300, 4000]}, "context of 2048"),
        ({"lenghts": [300]}, "did you mean 'lengths'"),
        ({"rivals": ["snapkv"]}, "give the share of tokens that it keeps"),
        ({"rivals": ["snapkv@0.25"]}, "give --rivals-python"),
        ({"rivals": ["snapkv@0.25"], "rivals_python": "python", "baselines": []}, "give --baselines dense"),
    ],
)
def test_bad_input_is_one_line_before_the_work(config, monkeypatch, capsys, changes, words):
    monkeypatch.setattr("moa_search.evaluation.suite.measure", lambda *a, **b: pytest.fail("the work began"))
    status, _, err = run(monkeypatch, capsys, config(**changes))
    assert status == 2
    assert words in err
    assert "Traceback" not in err


def test_from_python_with_a_loaded_model(tiny_model_dir, tmp_path, bars):
    loaded = load_model(str(tiny_model_dir), dtype="float32")
    plan = Plan.uniform(SpanRule(100, 0), ModelSignature.of(loaded[0].config))
    effective = api.report_model(
        loaded, output=str(tmp_path / "out"), plan=[plan], tasks=["passkey"], lengths=[300], samples=[1],
        against=[],
    )  # fmt: skip
    assert effective["variant"].tolist() == ["dense", "uniform like plan 1", "plan 1"]
    assert bars["Evaluating"][-1] == (900, 900)
