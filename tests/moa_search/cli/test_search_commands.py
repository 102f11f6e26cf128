"""``moa-search`` and its other commands, run as a user runs them, on a tiny model."""

import json
import re
from functools import partial

import pandas as pd
import pytest

from moa_search import Plan, api
from moa_search.cli import search
from moa_search.errors import ConfigError
from moa_search.formats.provenance import Validation
from tests.moa_search.formats.test_tiers import tiered


@pytest.fixture
def call(run_main):
    """Run ``moa-search``; returns exit status, output and errors."""
    return partial(run_main, search.main, "moa-search")


@pytest.fixture
def tiered_file(tiny_profile, tmp_path):
    """A profile that knows 16, 8, 4 and 2 bits."""
    path = tmp_path / "tiers.safetensors"
    tiered(tiny_profile).save(path)
    return path


def one_line(result):
    status, _, err = result
    assert status == 2
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("moa-search")]
    return line


class TestSearch:
    @pytest.mark.parametrize("option", ["--densities", "--kv-shares"])
    def test_several_budgets_make_one_table_and_one_picture(self, call, profiled, tmp_path, option):
        status, out, err = call(profiled, option, 0.3, 0.5, 0.8, "--output", tmp_path)
        assert status == 0, err
        assert "3" in out
        assert (tmp_path / "front" / "budgets.png").read_bytes().startswith(b"\x89PNG")
        plans = [Plan.load(tmp_path / "front" / f"plan-{index:02d}.json") for index in range(3)]
        assert [plan.density(300) <= density for plan, density in zip(plans, (0.3, 0.5, 0.8), strict=True)] == [
            True
        ] * 3
        assert Plan.load(tmp_path / "plan.json") in plans
        assert call(profiled, "--density", 0.3, "--output", tmp_path)[0] == 0
        assert not (tmp_path / "front" / "budgets.png").exists()

    def test_budgets_in_other_units_say_what_they_use(self, call, profiled, tmp_path):
        status, out, err = call(profiled, "--budget", "kv=100KiB@2048x2", "tokens=150@600", "--output", tmp_path)
        assert status == 0, err
        assert "kv=100KiB@2048x2: uses" in out
        plan = Plan.load(tmp_path / "plan.json")
        assert plan.kv_bytes(2048, batch=2) <= 100 * 1024
        assert sum(map(sum, plan.spans(600))) <= 150 * 4

    def test_validated_at_once(self, call, profiled, tmp_path, tiny_model_dir):
        status, out, err = call(
            profiled, "--density", 0.5, "--front-steps", 1, "--validate", tiny_model_dir, "--output", tmp_path
        )
        assert status == 0, err
        assert "the best on held-out samples" in out
        assert Plan.load(tmp_path / "plan.json").validated[0].length == 1200

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--density", 0.5, "--densities", 0.5, 0.6], "give one of them"),
            (["--kv-share", 0.5, "--kv-shares", 0.5, 0.6], "give one of them"),
            (["--densities", 0.5, 0.6, "--kv-shares", 0.5, 0.6], "give one of them"),
            (["--budget", "memry=2GiB@32k"], "did you mean 'memory'"),
            (["--budget", "decode=1ms@1024"], "hardware"),
            (["--layer-floor", "9=1.0"], "outside 0..1"),
            (["--length-weights", "512=1"], "512 is none of"),
            (["--rules-per-layer", 3], "rules_per_layer: 3 is out of range"),
            (["--predict-lengths", 100, "--budget-lengths", 600], "can't be told"),
            (["--robust=-1"], "robust: -1 is out of range"),
            (["--searcher", "moar"], "did you mean 'moa'"),
            (["--front-steps", 10**8], "take fewer steps"),
            (["--density", "25%"], "density: '25%' is no number; write 0.25"),
            (["--kv-share", "12.5 %"], "kv_share: '12.5 %' is no number; write 0.125"),
            (["--density", "25"], "density: 25 is out of range; it must be at most 1; 25 % is 0.25"),
            (["--tiers", 16, 4, "--kv-share", 0.5], "measure them with moa-profile --tiers 16 4"),
            (["--kv-share", 0.001], "can't be met: the smallest spans already take 0."),
        ],
    )
    def test_wrong_input_is_one_line(self, call, profiled, tmp_path, arguments, words):
        assert words in one_line(call(profiled, *arguments, "--output", tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_numbers_are_explained_and_missing_bits_are_told_once(self, call, profiled, tmp_path, caplog):
        status, out, err = call(profiled, "--kv-share", 0.5, "--output", tmp_path)
        assert status == 0, err
        assert "predicted loss: estimated rise of the answers' loss over full attention" in out
        assert "; gap: the best plan loses at most that much less" in out
        notes = [record.getMessage() for record in caplog.records if "kv_share" in record.getMessage()]
        assert notes == [
            "kv_share: the profile knows no fewer than 16 bits, so spans alone have to keep it; moa-profile --tiers "
            "16 8 4 2 measures fewer"
        ]

    def test_tiers_beside_budgets_that_count_no_bytes_are_told_of(self, call, tiered_file, tmp_path, caplog):
        tiers = ("--tiers", 16, 4, "--front-steps", 0, "--output", tmp_path)
        for budget in (("--density", 0.5), ("--kv-share", 0.5), ("--density", 0.9, "--budget", "kv=1MiB@512")):
            caplog.clear()
            assert call(tiered_file, *budget, *tiers)[0] == 0
            told = any("no budget counts bytes" in record.getMessage() for record in caplog.records)
            assert told == (budget == ("--density", 0.5))

    def test_bits_that_were_chosen_are_shown(self, call, tiered_file, tmp_path):
        status, out, err = call(tiered_file, "--kv-share", 0.3, "--output", tmp_path)
        assert status == 0, err
        assert "bits of keys/values: " in out
        assert re.search(r"bytes at \d+ tokens: \d+\.\d% of a 16-bit cache \(codes ", out)
        shares = pd.read_csv(tmp_path / "front" / "front.csv")["share@512"]
        assert (shares <= 0.3).all()
        assert f"{shares[0]:.1%}" in out

    def test_what_a_model_chose_is_replaced_on_request_alone(self, call, profiled, tmp_path, tiny_model_dir):
        search = [profiled, "--density", 0.5, "--front-steps", 0, "--output", tmp_path]
        assert call(*search)[0] == 0
        assert call(*search)[0] == 0, "what the search found itself is found again"
        plan = Plan.load(tmp_path / "plan.json")
        validated = plan.model_copy(update={"validated": (Validation(length=600, data="x", samples=2, loss=1.0),)})
        tuned = plan.model_copy(update={"provenance": plan.provenance.model_copy(update={"searcher": "tune"})})
        for kept, how in ((validated, "chosen on held-out samples"), (tuned, "tuned")):
            kept.save(tmp_path / "plan.json")
            assert f"plan.json was {how} and would be replaced" in one_line(call(*search))
            assert Plan.load(tmp_path / "plan.json") == kept
            assert call(*search, "--overwrite", "true")[0] == 0
            assert Plan.load(tmp_path / "plan.json") == plan

    def test_a_plan_is_no_profile(self, call, tmp_path, tiny_plan):
        tiny_plan.save(tmp_path / "plan.json")
        for command in ([], ["compare"], ["tune"]):
            extra = ["--model", "demo", "--output", tmp_path / "out"] if command == ["tune"] else []
            extra = ["--output", tmp_path / "out"] if not command else extra
            said = one_line(call(*command, tmp_path / "plan.json", "--density", 0.5, *extra))
            assert "plan.json: it is a plan, no profile; give the file that moa-profile wrote" in said


def test_compare_shows_bits_and_who_has_no_plan(call, tiered_file, tmp_path):
    status, out, err = call("compare", tiered_file, "--kv-share", 0.1, "--output", tmp_path)
    assert status == 0, err
    rows = pd.read_csv(tmp_path / "compare.csv").set_index("searcher")
    assert {"exact", "spans", "one-bits", "uniform-bits", "layer-bits", "dense-bits"} <= set(rows.index)
    assert "exact: key/value bits " in out
    assert "dense-bits: no plan, share=0.1@" in out
    assert rows["loss@512"].isna()["dense-bits"]
    assert rows.loc["exact", "share@512"] <= 0.1
    assert Plan.load(tmp_path / "one-bits.json").share(512) == rows.loc["one-bits", "share@512"]
    assert not (tmp_path / "dense-bits.json").exists()


def test_compare_prints_and_keeps_every_searcher(call, profiled, tmp_path, tiny_model_dir):
    status, out, err = call(
        "compare", profiled, "--density", 0.5, "--validate", tiny_model_dir, "--samples", 2, "--output", tmp_path
    )  # fmt: skip
    assert status == 0, err
    rows = pd.read_csv(tmp_path / "compare.csv").set_index("searcher")
    assert list(rows.index) == ["exact", "moa", "duo", "per-layer", "recall", "uniform"]
    for name, row in rows.iterrows():
        assert name in out
        assert Plan.load(tmp_path / f"{name}.json").density(300) == row["density@300"] <= 0.5
        assert row["true_loss@600"] > 0
    assert (rows["loss@300"] + rows["loss@600"]).idxmin() == "exact"


def test_validate_then_tune_in_one_folder(call, profiled, tmp_path, tiny_model_dir):
    out_folder = tmp_path / "out"
    assert call(profiled, "--density", 0.5, "--front-steps", 1, "--output", out_folder)[0] == 0
    options = ["--model", tiny_model_dir, "--lengths", 300, "--samples", 2]
    status, out, err = call("validate", out_folder, *options)
    assert status == 0, err
    assert "chosen" in out
    measured = sorted((out_folder / "validation").iterdir())
    tune = ["tune", profiled, "--density", 0.5, *options, "--trials", 6, "--output", out_folder]
    status, out, err = call(*tune)
    assert status == 0, err
    assert "6 complete" in out
    plan = Plan.load(out_folder / "plan.json")
    assert plan.provenance.searcher == "tune"
    assert plan.provenance.knobs["exponent"] > 0
    assert plan.density(600) <= 0.5
    assert set(measured) <= set((out_folder / "validation").iterdir())  # the front's plans weren't measured again
    assert "6 complete" in call(*tune)[1]
    assert "trials" in one_line(call(*tune[:-4], "--trials", 0, "--output", out_folder))
    refused = one_line(call(*tune[:3], 0.4, *tune[4:]))
    assert "density" in refused


def test_tune_over_densities_writes_the_front_of_loss_and_density(call, profiled, tmp_path, tiny_model_dir):
    status, out, err = call(
        "tune", profiled, "--densities", 0.3, 0.9, "--model", tiny_model_dir, "--lengths", 300, "--samples", 2,
        "--trials", 6, "--workers", 2, "--output", tmp_path,
    )  # fmt: skip
    assert status == 0, err
    plans = [Plan.load(path) for path in sorted((tmp_path / "front").glob("plan-*.json"))]
    assert plans
    assert all(plan.density(600) <= 0.9 for plan in plans)
    assert "density" in out


def test_tune_refuses_budgets_that_no_plan_keeps_before_it_makes_a_study(call, profiled, tmp_path, tiny_model_dir):
    tune = ["tune", profiled, "--model", tiny_model_dir, "--output", tmp_path / "out", "--density", 0.001]
    assert "can't be met" in one_line(call(*tune))
    assert not (tmp_path / "out").exists()


def test_a_study_goes_on_with_the_device_and_weights_it_was_made_with(call, profiled, tmp_path, tiny_model_dir):
    tune = [
        "tune", profiled, "--model", tiny_model_dir, "--lengths", 300, "--samples", 2, "--trials", 2,
        "--output", tmp_path, "--budget", "decode=1ms@600", "--hardware", "h200", "--weights-bytes",
    ]  # fmt: skip
    status, _, err = call(*tune, 1000)
    assert status == 0, err
    assert "weights_bytes 1000, not 2000" in one_line(call(*tune, 2000))
    assert "h200" in one_line(call(*[word if word != "h200" else "l40s" for word in tune], 1000))


@pytest.mark.parametrize("command", [[], ["compare"]], ids=["search", "compare"])
def test_a_model_that_cannot_be_loaded_is_told_before_anything_is_written(call, profiled, tmp_path, command):
    result = call(*command, profiled, "--density", 0.5, "--validate", tmp_path / "none", "--output", tmp_path / "out")
    assert "neither a folder" in one_line(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "wrong", "words"),
    [
        (["compare", "--validate"], ["--lengths", 0], "lengths: 0"),
        (["compare", "--validate"], ["--lengths", 99999], "over the model's context"),
        (["tune", "--model"], ["--lengths", 0], "lengths: 0"),
        (["tune", "--model"], ["--storage", "foo://x"], "sqlite:///PATH"),
        (["tune", "--model"], ["--storage", "PROFILE"], "isn't the journal of a study"),
        (["tune", "--model"], ["--sources", "nosuch.jsonl"], "nosuch.jsonl"),
    ],
)
def test_nothing_is_written_when_samples_or_storage_are_wrong(
    call, profiled, tmp_path, tiny_model_dir, command, wrong, words
):
    wrong = [profiled if word == "PROFILE" else word for word in wrong]
    name, *options = command
    result = call(name, profiled, *options, tiny_model_dir, "--density", 0.5, *wrong, "--output", tmp_path / "out")
    assert words in one_line(result)
    assert not (tmp_path / "out").exists()


def test_a_study_that_no_worker_could_begin_is_none(call, profiled, tmp_path, tiny_model_dir):
    tune = [
        "tune", profiled, "--model", tiny_model_dir, "--density", 0.5, "--lengths", 300, "--samples", 2, "--trials", 2,
        "--output", tmp_path / "out",
    ]  # fmt: skip
    assert "no worker could begin" in one_line(call(*tune, "--workers", 2, "--sources", "nosuch.jsonl"))
    status, out, err = call(*tune)
    assert status == 0, err
    assert "2 complete" in out


@pytest.mark.parametrize("length", [0, 2**27 + 1, 10**30])
def test_lengths_that_nobody_has_are_refused(profiled, tmp_path, length):
    plan = api.search_plan(str(profiled), density=0.5)
    with pytest.raises(ConfigError, match=f"lengths: {length} is out of range"):
        api.inspect_plan(plan, lengths=[300, length])


def test_an_error_stands_alone(call, tmp_path):
    (tmp_path / "foreign.safetensors").write_text("hi")
    _, _, err = call(tmp_path / "foreign.safetensors", "--output", tmp_path / "out")
    assert len(err.splitlines()) == 1


def test_a_misspelt_command(call):
    assert "did you mean 'validate'" in one_line(call("validat", "out"))


def test_help_names_the_other_commands(call):
    status, out, _ = call("--help")
    assert status == 0
    for command in search.COMMANDS:
        assert f"moa-search {command}" in " ".join(out.split())


def test_a_front_that_is_none(call, tmp_path):
    assert "no front" in one_line(call("validate", tmp_path, "--model", "demo"))
    assert json.dumps(str(tmp_path))[1:-1] in one_line(call("validate", tmp_path, "--model", "demo"))
