"""A front on true loss: what is measured, what is written, what is refused."""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moa_search import calibration, profile_model, search_front
from moa_search.api.validating import held_out_loss, validate_front
from moa_search.cli import search
from moa_search.cli.command import parse
from moa_search.data import hash_samples
from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError
from moa_search.evaluation import true_loss
from moa_search.evaluation.scoring import score_answer
from moa_search.formats import ModelSignature, Plan
from moa_search.formats.provenance import Budget, LengthMetrics, Provenance
from moa_search.modeling.loading import load_model
from moa_search.runtime import applied
from moa_search.search import Front
from moa_search.spans import DENSE, SpanRule

OPTIONS = {"lengths": [400, 300], "samples": 4}


@pytest.fixture(scope="module")
def tiny_model(tiny_model_dir):
    return load_model(str(tiny_model_dir), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def signature(tiny_model):
    return ModelSignature.of(tiny_model[0].config)


@pytest.fixture
def plans(signature):
    """Four plans; the last one acts as the second does."""
    predicted = tuple(LengthMetrics(length=n, density=0.5, attention_density=0.5, loss=n / 100) for n in (150, 200))
    rules = (SpanRule(40, 0), SpanRule(0, 128), DENSE)
    made = [Plan.uniform(rule, signature, sink=4, block=16, predicted=predicted) for rule in rules]
    return [*made, made[1].model_copy(update={"predicted": ()})]


@pytest.fixture
def folder(tmp_path, plans):
    write(tmp_path, plans, plans[1])
    return tmp_path


def write(folder, plans, chosen):
    for index, plan in enumerate(plans):
        plan.save(folder / "front" / f"plan-{index:02d}.json")
    chosen.save(folder / "plan.json")


@pytest.fixture
def scored(monkeypatch):
    """The plan's first rule, or None, for every sample that is really run."""
    seen, original = [], true_loss.score_answer

    def counting(model, sample):
        plan = getattr(model.config, "moa_plan", None)
        seen.append(plan and tuple(plan["patterns"][0][0].values()))
        return original(model, sample)

    monkeypatch.setattr(true_loss, "score_answer", counting)
    return seen


@pytest.fixture(scope="module", autouse=True)
def _drawn_once():
    """Drawing takes a second; equal arguments draw equal samples."""
    kept, original = {}, calibration.calibrate

    def drawn(model, tokenizer, **options):
        key = repr(sorted(options.items()))
        if key not in kept:
            kept[key] = original(model, tokenizer, **options)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "calibrate", drawn)
        yield


def reference(tiny_model, plan, length):
    """Losses on the held-out samples of one length, each with its source, put together here; and their hash."""
    model, tokenizer = tiny_model
    options = {"sources": ("passkey", "copy"), "seed": 0, "split": "validation", "answers": "dataset", "chat": "never"}
    samples = calibration.calibrate(model, tokenizer, **OPTIONS, **options).samples
    ours = [sample for sample in samples if sample.length == length]
    if plan is None:
        losses = [score_answer(model, sample).nll for sample in ours]
    else:
        with applied(model, plan):
            losses = [score_answer(model, sample).nll for sample in ours]
    return pd.DataFrame({"source": [sample.task for sample in ours], "loss": losses}), hash_samples(ours)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_table_holds_what_was_lost(tiny_model, folder, plans):
    rows = validate_front(str(folder), model=tiny_model, **OPTIONS)
    assert rows["plan"].tolist() == [f"plan-{i:02d}.json" for i in range(4) for _ in range(2)]
    assert rows["length"].tolist() == [400, 300] * 4
    for row in rows.itertuples():
        plan = plans[int(row.plan[5:7])]
        (sparse, _), (dense, _) = (reference(tiny_model, which, row.length) for which in (plan, None))
        both = sparse.assign(dense=dense["loss"], difference=sparse["loss"] - dense["loss"])
        means = both.groupby("source").mean()
        errors = both.groupby("source").std() / np.sqrt(2)
        assert row.samples == 4
        assert row.true_loss == pytest.approx(means["loss"].mean())
        assert row.dense_loss == pytest.approx(means["dense"].mean())
        assert row.difference == pytest.approx(row.true_loss - row.dense_loss, abs=1e-9)
        assert row.true_error == pytest.approx(np.sqrt((errors["loss"] ** 2).sum()) / 2)
        assert row.difference_error == pytest.approx(np.sqrt((errors["difference"] ** 2).sum()) / 2)
        assert row.density == plan.density(row.length)
        assert row.attention_density == plan.attention_density(row.length)
        assert row.chosen_before == (plan.fingerprint == plans[1].fingerprint)
    np.testing.assert_array_equal(rows["loss@150"], [1.5] * 6 + [np.nan] * 2)
    np.testing.assert_array_equal(rows["loss@200"], [2.0] * 6 + [np.nan] * 2)
    pd.testing.assert_frame_equal(pd.read_csv(folder / "validation.csv"), rows)


def test_the_best_is_chosen_and_plans_say_what_they_lost(tiny_model, folder, plans):
    rows = validate_front(str(folder), model=tiny_model, **OPTIONS)
    means = rows.groupby("plan")["true_loss"].mean()
    best = means.index[int(means.to_numpy().argmin())]
    assert rows["chosen"].tolist() == (rows["plan"] == best).tolist()
    assert (folder / "plan.json").read_bytes() == (folder / "front" / best).read_bytes()
    for index, plan in enumerate(plans):
        written = Plan.load(folder / "front" / f"plan-{index:02d}.json")
        assert written.model_copy(update={"validated": ()}) == plan
        mine = rows[rows["plan"] == f"plan-{index:02d}.json"].set_index("length")
        for entry, length in zip(written.validated, (300, 400), strict=True):
            assert entry.length == length
            assert entry.samples == 4
            assert entry.data == reference(tiny_model, None, length)[1]
            assert entry.loss == mine.loc[length, "true_loss"]
            assert entry.loss_error == mine.loc[length, "true_error"]
            assert entry.dense_loss == mine.loc[length, "dense_loss"]


def test_a_search_validates_without_a_folder(tiny_model_dir, tmp_path, monkeypatch):
    """The same front comes out as with one, whose files say the same."""
    profile = profile_model(str(tiny_model_dir), lengths=[300], samples=2, answers="dataset", dtype="float32")
    options = {"density": [0.5], "front_steps": 2, "predict_lengths": [600], "validate": str(tiny_model_dir)}
    front = search_front(profile, **options, output=str(tmp_path))
    monkeypatch.chdir(tmp_path / "validation")
    before = contents(tmp_path)
    alone = search_front(profile, **options)
    assert contents(tmp_path) == before
    assert len(alone.plans) > 1
    assert alone == front
    assert all(plan.validated[0].length == 600 for plan in alone.plans)
    losses = [plan.validated[0].loss for plan in alone.plans]
    assert losses[alone.chosen_index] == min(losses)
    read = Front.load(tmp_path)
    assert (read.plans, read.chosen_index) == (list(alone.plans), alone.chosen_index)
    table = pd.read_csv(tmp_path / "validation.csv")
    assert table["true_loss"].tolist() == losses


def test_of_equals_the_first_is_chosen(tiny_model, tmp_path, signature):
    """Spans over the samples' length keep all of it, each in another plan."""
    plans = [Plan.uniform(SpanRule(alpha, 0), signature) for alpha in (80, 700, 600)]
    write(tmp_path, plans, plans[2])
    rows = validate_front(str(tmp_path), model=tiny_model, **OPTIONS)
    equal = rows.groupby("plan")["true_loss"].mean()
    assert equal.iloc[1] == equal.iloc[2] != equal.iloc[0]
    first = "plan-00.json" if equal.iloc[0] < equal.iloc[1] else "plan-01.json"
    assert rows[rows["chosen"]]["plan"].unique().tolist() == [first]


def test_a_larger_budget_does_not_win(tiny_model, tmp_path, signature):
    """In a front over budgets the choice stays under that of plan.json."""
    rules = {0.25: (SpanRule(40, 0), SpanRule(41, 0)), 1.0: (DENSE, SpanRule(200, 0))}
    plans = [
        Plan.uniform(rule, signature, provenance=Provenance(searcher="x", budgets=(Budget(length=300, density=share),)))
        for share, both in rules.items()
        for rule in both
    ]
    for chosen, rivals in ((plans[0], ["plan-00.json", "plan-01.json"]), (plans[3], ["plan-02.json", "plan-03.json"])):
        write(tmp_path, plans, chosen)
        rows = validate_front(str(tmp_path), model=tiny_model, **OPTIONS)
        means = rows[rows["plan"].isin(rivals)].groupby("plan")["true_loss"].mean()
        assert rows[rows["chosen"]]["plan"].unique().tolist() == [means.idxmin()]
    (tmp_path / "plan.json").unlink()
    rows = validate_front(str(tmp_path), model=tiny_model, **OPTIONS)
    assert rows[rows["chosen"]]["plan"].unique().tolist() == [rows.groupby("plan")["true_loss"].mean().idxmin()]


def test_dense_and_the_chosen_plan_come_first_and_equal_plans_once(tiny_model, folder, scored):
    validate_front(str(folder), model=tiny_model, **OPTIONS)
    runs = [None, ("span", 0, 128), ("span", 40, 0), ("dense",)]
    assert scored == [run for run in runs for _ in range(8)]


def test_a_second_run_measures_nothing_and_writes_the_same(tiny_model, folder, scored):
    first = validate_front(str(folder), model=tiny_model, **OPTIONS)
    before = contents(folder)
    scored.clear()
    again = validate_front(str(folder), model=tiny_model, **OPTIONS)
    assert scored == []
    pd.testing.assert_frame_equal(again.drop(columns="chosen_before"), first.drop(columns="chosen_before"))
    after = contents(folder)
    del before[Path("validation.csv")], after[Path("validation.csv")]  # tells what was chosen before
    assert after == before


def test_a_stopped_run_goes_on_where_it_was(tiny_model, folder, plans, monkeypatch, tmp_path_factory):
    seen, original = [], true_loss.score_answer

    def stopping(model, sample):
        if len(seen) == 8 + 8 + 5:
            raise KeyboardInterrupt
        seen.append(sample.length)
        return original(model, sample)

    monkeypatch.setattr(true_loss, "score_answer", stopping)
    with pytest.raises(KeyboardInterrupt):
        validate_front(str(folder), model=tiny_model, **OPTIONS)
    assert not (folder / "validation.csv").exists()
    assert Plan.load(folder / "plan.json") == plans[1]
    done = [len(Plan.load(folder / "front" / f"plan-{i:02d}.json").validated) for i in range(4)]
    assert done == [0, 2, 0, 2]
    seen.clear()
    rows = validate_front(str(folder), model=tiny_model, **OPTIONS)
    assert seen == [300] * 4 + [400] * 4 + [300] * 4
    monkeypatch.setattr(true_loss, "score_answer", original)
    whole = tmp_path_factory.mktemp("whole")
    write(whole, plans, plans[1])
    pd.testing.assert_frame_equal(rows, validate_front(str(whole), model=tiny_model, **OPTIONS))


def test_entries_of_other_samples_stay(tiny_model, folder):
    validate_front(str(folder), model=tiny_model, **OPTIONS)
    validate_front(str(folder), model=tiny_model, lengths=[300], samples=4, seed=1)
    validated = Plan.load(folder / "front" / "plan-00.json").validated
    assert [entry.length for entry in validated] == [300, 300, 400]
    assert len({entry.data for entry in validated}) == 3


def test_a_chosen_plan_from_elsewhere_joins_the_front(tiny_model, folder, plans, signature, scored):
    own = Plan.uniform(SpanRule(77, 0), signature)
    own.save(folder / "plan.json")
    rows = validate_front(str(folder), model=tiny_model, **OPTIONS)
    assert scored[8] == ("span", 77, 0)
    assert rows[rows["chosen_before"]]["plan"].unique().tolist() == ["plan-04.json"]
    assert Plan.load(folder / "front" / "plan-04.json").fingerprint == own.fingerprint


def test_a_front_without_a_choice_gets_one(tiny_model, folder):
    (folder / "plan.json").unlink()
    rows = validate_front(str(folder), model=tiny_model, **OPTIONS)
    assert not rows["chosen_before"].any()
    assert (folder / "plan.json").exists()


@pytest.mark.parametrize(("profiled", "expected"), [(150, 300), (1500, 2048)])
def test_by_default_twice_as_long_as_profiled_but_within_the_context(
    tiny_model, tmp_path, signature, scored, profiled, expected
):
    metrics = [
        LengthMetrics(length=profiled, density=0.5, attention_density=0.5, loss=1.0),
        LengthMetrics(length=2048, density=0.5, attention_density=0.5),
    ]
    plan = Plan.uniform(SpanRule(40, 0), signature, predicted=tuple(metrics))
    write(tmp_path, [plan], plan)
    rows = validate_front(str(tmp_path), model=tiny_model, samples=1)
    assert rows["length"].tolist() == [expected]
    assert rows["true_error"].isna().all()


def test_progress_covers_all_runs(tiny_model, folder, bars):
    validate_front(str(folder), model=tiny_model, **OPTIONS)
    tokens = 4 * 400 + 4 * 300
    assert bars["Validating"][-1] == (3, 3), "dense attention comes before the distinct plans"
    assert bars["Measuring losses"].count((tokens, tokens)) >= 4


def test_held_out_samples_are_no_calibration_samples(tiny_model):
    model, tokenizer = tiny_model
    options = {"sources": ["passkey"], "lengths": [300], "samples": 3}
    truth = held_out_loss(model, tokenizer, **options)
    for split, same in (("validation", True), ("calibration", False), ("test", False)):
        drawn = calibration.calibrate(model, tokenizer, **options, split=split, answers="dataset", chat="never")
        assert (hash_samples(drawn.samples) == truth.data_hash) is same
    assert held_out_loss(model, tokenizer, **options, seed=1).data_hash != truth.data_hash


class TestRefused:
    @pytest.fixture(autouse=True)
    def _no_work(self, monkeypatch):
        monkeypatch.setattr(true_loss, "score_answer", lambda *a: pytest.fail("the work began"))

    def refused(self, folder, tiny_model, message, error=ConfigError, **changes):
        before = contents(folder)
        with pytest.raises(error, match=message) as caught:
            validate_front(str(folder), model=tiny_model, **OPTIONS | changes)
        assert len(str(caught.value).splitlines()) == 1
        assert contents(folder) == before

    def test_a_folder_without_a_front(self, tmp_path, tiny_model):
        message = r"it holds no front/plan-\*\.json; give the folder that moa-search wrote to"
        self.refused(tmp_path, tiny_model, message)
        self.refused(tmp_path / "absent", tiny_model, message)

    def test_plans_of_another_model(self, folder, tiny_model, tiny_plan):
        tiny_plan.save(folder / "front" / "plan-02.json")
        self.refused(folder, tiny_model, r"plan-02\.json was made for another model", ModelMismatchError)

    def test_damaged_plans(self, folder, tiny_model):
        (folder / "front" / "plan-02.json").write_text("{")
        self.refused(folder, tiny_model, r"plan-02\.json: not a JSON file", PlanFormatError)

    def test_lengths_over_the_context(self, folder, tiny_model):
        self.refused(folder, tiny_model, "length 2049 is over the model's context of 2048 tokens", lengths=[300, 2049])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"samples": 0}, "samples"),
            ({"lengths": []}, "lengths"),
            ({"lengths": [0]}, "lengths"),
            ({"lengths": [300, 300]}, "names one twice"),
            ({"sources": ["paskey:"]}, "did you mean 'passkey'"),
        ],
    )
    def test_options(self, folder, tiny_model, changes, message):
        self.refused(folder, tiny_model, message, **changes)

    def test_plans_that_name_no_length(self, tmp_path, tiny_model, signature):
        plan = Plan.uniform(SpanRule(40, 0), signature)
        write(tmp_path, [plan], plan)
        self.refused(tmp_path, tiny_model, "give --lengths", lengths=None)


def test_every_option_is_a_flag():
    validate = partial(parse, "moa-search validate", search.COMMANDS["validate"])
    line = "out --model m --sources copy passkey --lengths 300 400 --samples 3 --answers model --chat auto --seed 2"
    folder, options = validate([*line.split(), "--dtype", "float32", "--device", "cpu"])
    assert (folder, options.model, options.sources) == ("out", "m", ["copy", "passkey"])
    assert (options.lengths, options.samples, options.answers, options.chat) == ([300, 400], 3, "model", "auto")
    assert (options.seed, options.dtype, options.device) == (2, "float32", "cpu")
    assert validate(["out", "--model", "m"])[1].lengths is None
