"""One thing has one name, whichever command writes it: tables of different commands can be joined."""

import pandas as pd
import pytest

from moa_search import api, load_model
from moa_search.formats import ModelSignature, Plan
from moa_search.spans import SpanRule

KEYS = ["task", "length", "variant"]
MEASURED = ["density", "attention_density", "metric", "answers", "n", "nll", "score"]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return load_model(str(tiny_model_dir), dtype="float32")


@pytest.fixture(scope="module")
def plan_files(loaded, tmp_path_factory):
    """Plans by file: one keeps little, one is called as a baseline is, one as the spans of another plan are."""
    folder = tmp_path_factory.mktemp("plans")
    signature = ModelSignature.of(loaded[0].config)
    rules = {"mine": SpanRule(100, 0), "dense": SpanRule(0, 64), "uniform like mine": SpanRule(70, 0)}
    for name, rule in rules.items():
        Plan.uniform(rule, signature, anchor="prompt").save(folder / f"{name}.json")
    return [str(folder / f"{name}.json") for name in rules]


@pytest.fixture(scope="module")
def profile(loaded):
    return api.profile_model(loaded, lengths=[300], samples=2, answers="dataset")


@pytest.fixture(scope="module")
def report(loaded, plan_files, profile, tmp_path_factory):
    """The folder of a report on given and on searched plans."""
    folder = tmp_path_factory.mktemp("report")
    api.report_model(
        loaded, plan=plan_files, profile=profile, searchers=["exact", "uniform"], densities=[0.5, 0.323456789],
        tasks=["passkey", "perplexity"], lengths=[300, 500], samples=[2], windows=False, output=str(folder),
    )  # fmt: skip
    return folder


def scores(loaded, folder, plans, **changes):
    """What moa-eval's CSV says, as means."""
    from moa_search.evaluation import summarise

    options = {"tasks": ["perplexity", "passkey"], "lengths": [500, 300], "samples": 2, **changes}
    api.evaluate_model(loaded, plan=plans, output=str(folder / "items.csv"), **options)
    return summarise(pd.read_csv(folder / "items.csv"))


def joined(mine, theirs, keys):
    """Rows of both, which have the same keys."""
    both = mine.merge(theirs, on=keys, how="outer", indicator=True, suffixes=("", "_other"))
    assert (both["_merge"] == "both").all(), both[both["_merge"] != "both"][[*keys, "_merge"]]
    return both


def assert_same(both, columns):
    for name in columns:
        pd.testing.assert_series_equal(both[name], both[f"{name}_other"], check_names=False, check_dtype=False)


def test_given_plans_and_their_baselines_in_scores_and_reports(loaded, report, plan_files, tmp_path):
    theirs = pd.read_csv(report / "summary.csv")
    theirs = theirs[~theirs["variant"].str.contains("@")]
    mine = scores(loaded, tmp_path, plan_files)
    assert "uniform like mine" in set(mine["variant"])
    assert "plan uniform like mine" in set(mine["variant"]), "the plan, not the baseline of that name"
    assert_same(joined(mine, theirs, KEYS), MEASURED)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_plan_alone_is_called_as_among_others(loaded, report, plan_files, tmp_path, number):
    mine = scores(loaded, tmp_path, [plan_files[number]], tasks=["passkey"])
    theirs = pd.read_csv(report / "summary.csv")
    both = mine.merge(theirs, on=KEYS, suffixes=("", "_other"))
    assert len(both) == len(mine) == 2 * 3
    assert_same(both, MEASURED)


def test_searched_plans_are_called_as_their_files_are(loaded, report, tmp_path):
    """A report's plans, scored once more."""
    files = sorted((report / "plans").glob("*/*.json"))
    names = {"exact @ 0.5", "uniform @ 0.5", "exact @ 0.323456789", "uniform @ 0.323456789"}
    mine = scores(loaded, tmp_path, list(map(str, files)), tasks=["passkey"])
    theirs = pd.read_csv(report / "summary.csv")
    both = mine.merge(theirs, on=KEYS, suffixes=("", "_other"))
    assert {*names, "uniform like exact @ 0.5"} <= set(both["variant"])
    assert_same(both, MEASURED)


def test_a_report_on_its_own_plans_keeps_both_apart(loaded, report, profile, tmp_path):
    (file,) = (report / "plans").glob("*/exact @ 0.5.json")
    api.report_model(
        loaded, plan=[str(file)], profile=profile, searchers=["exact"], densities=[0.5], tasks=["passkey"],
        lengths=[300], samples=[1], windows=False, output=str(tmp_path),
    )  # fmt: skip
    names = pd.read_csv(tmp_path / "summary.csv")["variant"].tolist()
    given = f"{file.parent.name}/exact @ 0.5"
    assert names == ["dense", f"uniform like {given}", given, "uniform like exact @ 0.5", "exact @ 0.5"]


def test_lm_eval_names_variants_as_reports_do(report, plan_files):
    from moa_search.api.variants import given_plans
    from moa_search.evaluation import make_variants

    # What run_harness makes of its options; running tasks takes the extra eval (test_harness.py).
    names = [variant.name for variant in make_variants(given_plans(plan_files), ["dense", "uniform"]).variants]
    theirs = pd.read_csv(report / "summary.csv")["variant"].drop_duplicates()
    assert names == [name for name in theirs if "@" not in name]


def test_speed_and_scores_name_variants_lengths_and_densities_alike(loaded, report, plan_files, tmp_path):
    api.measure_throughput(
        loaded, plan=plan_files, ways=["dense", "plan"], lengths=[300, 500], decode_tokens=2, repetitions=1,
        output=str(tmp_path),
    )  # fmt: skip
    speed, theirs = pd.read_csv(tmp_path / "summary.csv"), pd.read_csv(report / "summary.csv")
    theirs = theirs[(theirs["task"] == "passkey") & ~theirs["variant"].str.contains("@")]
    theirs = theirs[~theirs["variant"].str.startswith("uniform")]
    assert_same(joined(speed, theirs, ["variant", "length"]), ["density", "attention_density"])


def test_predicted_and_true_losses_have_one_column_name_each(loaded, profile, tmp_path):
    """In front.csv, validation.csv and compare.csv."""
    model = loaded[0].config.name_or_path
    api.search_front(profile, density=[0.5], output=str(tmp_path / "front"))
    options = {"lengths": [300], "samples": 4}
    api.validate_front(str(tmp_path / "front"), model=model, **options)
    api.compare_searchers(
        profile, density=[0.5], searchers=["exact"], validate=model, output=str(tmp_path / "compare"), **options
    )
    front = pd.read_csv(tmp_path / "front" / "front" / "front.csv")
    validated = pd.read_csv(tmp_path / "front" / "validation.csv")
    (compared,) = pd.read_csv(tmp_path / "compare" / "compare.csv").to_dict("records")
    predicted = [name for name in front.columns if name.startswith("loss@")]
    assert "loss@300" in predicted
    assert_same(joined(validated, front, ["plan"]), predicted)
    plan = Plan.load(tmp_path / "compare" / "exact.json")
    files = [tmp_path / "front" / "front" / name for name in front["plan"]]
    index = [Plan.load(path).fingerprint for path in files].index(plan.fingerprint)
    first = validated.iloc[index]
    shared = [name for name in compared if name.startswith("loss@")]
    assert shared == ["loss@300"]
    for name in shared:
        assert compared[name] == pytest.approx(first[name])
    assert compared["true_loss@300"] == pytest.approx(first["true_loss"])
    assert 0 < compared["true_error@300"] == pytest.approx(first["true_error"])
    assert compared["density@300"] == first["density"] == front["density@300"][index]
