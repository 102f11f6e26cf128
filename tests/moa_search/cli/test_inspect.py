"""moa-inspect, run as a user runs it, with wrong input too."""

import json
from functools import partial

import pytest

from moa_search.cli import inspect
from moa_search.formats import Plan
from moa_search.formats.provenance import LengthMetrics, Provenance
from moa_search.search import Front
from moa_search.spans import SpanRule
from tests.moa_search.formats.test_tiers import tiered


@pytest.fixture
def call(run_main):
    """Run the command; returns exit status, output and errors."""
    return partial(run_main, inspect.main, "moa-inspect")


@pytest.fixture
def folder(tiny_profile, tmp_path):
    """A folder with a profile, and a front of two plans."""
    tiny_profile.save(tmp_path / "p.safetensors")
    model = tiny_profile.header.model
    plans = []
    for loss, rule in ((0.5, SpanRule(64, 32)), (0.3, SpanRule(0, 128))):
        plan = Plan.uniform(rule, model, sink=4, block=64, provenance=Provenance(searcher="uniform"))
        predicted = [
            LengthMetrics(length=n, density=plan.density(n), attention_density=plan.attention_density(n), loss=loss)
            for n in (512, 1024)
        ]
        plans.append(plan.model_copy(update={"predicted": tuple(predicted)}))
    Front(plans).save(tmp_path / "out")
    Plan.uniform(SpanRule(300, 0), model, sink=4, block=64).save(tmp_path / "uniform.json")
    return tmp_path


class TestKinds:
    """Without a subcommand the file says which it is."""

    def test_a_plan(self, call, folder):
        status, bare, _ = call(folder / "out" / "plan.json")
        assert status == 0
        assert "Span in tokens at 1024" in bare
        assert call("plan", folder / "out" / "plan.json")[:2] == (0, bare)
        assert call("--plan", folder / "out" / "plan.json")[:2] == (0, bare)

    def test_what_vllm_holds(self, call, folder, tiny_profile):
        """One group holds what its longest head keeps; two that split the rules, the plan's own share."""
        model = tiny_profile.header.model
        rules = [[SpanRule(128, 0), SpanRule(0, 256)]] * model.num_hidden_layers
        Plan.from_rules(rules, model).save(folder / "halves.json")
        status, text, _ = call(folder / "halves.json", "--vllm", "--lengths", "1024")
        assert status == 0
        row = next(line for line in text.split("What vLLM holds")[1].splitlines() if "1024" in line)
        assert [cell.strip() for cell in row.split("│")[2:5]] == ["56.2%", "100.0%", "56.2%"]
        assert "What vLLM holds" not in call(folder / "halves.json")[1]
        Plan.from_rules(rules, model, anchor="prompt").save(folder / "prompt.json")
        status, _, errors = call(folder / "prompt.json", "--vllm", "true")
        assert status == 2
        assert "vLLM can't serve rules anchored at the prompt" in errors

    def test_a_profile(self, call, folder):
        status, bare, _ = call(folder / "p.safetensors")
        assert status == 0
        assert "signed loss, window 128 of 1024" in bare
        assert call("profile", folder / "p.safetensors")[:2] == (0, bare)
        assert "recall loss, window 64 of 512" in call(folder / "p.safetensors", "--criterion", "recall")[1]

    def test_a_profile_with_tiers_shows_what_fewer_bits_add_on_its_page_too(self, call, folder, tiny_profile):
        tiered(tiny_profile, (8, 4)).save(folder / "bits.safetensors")
        status, out, err = call(folder / "bits.safetensors", "--html", folder / "bits.html")
        assert status == 0, err
        for shown in (out, (folder / "bits.html").read_text()):
            assert "in fewer bits add" in " ".join(shown.split())

    def test_a_front(self, call, folder):
        status, bare, _ = call(folder / "out")
        assert status == 0
        assert "00 (plan.json)" in bare
        assert call("front", folder / "out")[:2] == (0, bare)
        (folder / "out" / "plan.json").unlink()
        assert "holds no plan.json" in call(folder / "out")[1]


class TestDiff:
    def test_both_densities_and_the_largest_changes(self, call, folder):
        status, out, _ = call("diff", folder / "out" / "plan.json", folder / "uniform.json", "--lengths", 1024)
        assert status == 0
        assert "6 of 6 KV heads differ\n" in out
        assert "Changed heads at 1024 tokens" in out
        assert "uniform.json" in out

    def test_a_plan_of_another_tool_beside_one_of_ours(self, call, folder):
        other = folder / "moa.json"
        other.write_text(json.dumps({"alphas": [[256] * 4] * 3, "betas": [[0.0] * 4] * 3}))
        status, out, err = call("diff", other, folder / "uniform.json", "--lengths", 1024)
        assert status == 0, err
        assert "6 of 6 KV heads differ; sink 64 and 4; anchor prompt and position" in out
        status, _, err = call("diff", other, other)
        assert status == 2
        assert "neither" in err
        assert "--model MODEL --save" in err

    def test_two_files_need_no_subcommand(self, call, folder):
        files = folder / "out" / "plan.json", folder / "uniform.json"
        assert call(*files)[:2] == call("diff", *files)[:2]

    def test_a_plan_and_itself(self, call, folder):
        status, out, _ = call("diff", folder / "uniform.json", folder / "uniform.json")
        assert status == 0
        assert "the plans act the same" in out
        assert "Changed heads" not in out

    def test_plans_of_one_name_are_told_apart_by_their_folders(self, call, folder):
        (folder / "b").mkdir()
        (folder / "b" / "plan.json").write_bytes((folder / "uniform.json").read_bytes())
        out = call("diff", folder / "out" / "plan.json", folder / "b" / "plan.json")[1]
        assert "out/plan.json" in out
        assert "b/plan.json" in out


def test_pictures_and_pages_are_written(call, folder):
    for index, command in enumerate(
        (
            ["out/plan.json", "--profile", folder / "p.safetensors", "--heads", "0:1", "2:0"],
            ["p.safetensors", "--heads", "0:1"],
            ["diff", "out/plan.json", "uniform.json"],
            ["out"],
        )
    ):
        paths = [folder / word if (folder / str(word)).exists() else word for word in command]
        page, picture = folder / f"{index}.html", folder / f"{index}.png"
        status, out, err = call(*paths, "--html", page, "--output", picture)
        assert status == 0, err
        assert f"page written to {page}" in out
        assert page.read_text().startswith("<!DOCTYPE html>")
        assert f"written to {picture}" in out
        assert picture.read_bytes().startswith(b"\x89PNG")
    plan_page = (folder / "0.html").read_text()
    assert "a ring around the chosen one" in plan_page, "the front that the plan lies in"
    assert "Predicted loss of each layer at 512 tokens" in plan_page
    assert "Mask of layer 2, KV head 0" in plan_page


class TestBadInput:
    """One clear line, exit status 2, nothing written."""

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["nowhere.json"], ["nowhere.json", "No such file"]),
            (["nowhere.safetensors"], ["nowhere.safetensors", "No such file"]),
            (["front", "nowhere"], ["nowhere", "no front/plan-*.json"]),
            (["front", "p.safetensors"], ["p.safetensors", "no front/plan-*.json"]),
            (["profile", "out/plan.json"], ["plan.json", "it is a plan, no profile"]),
            (["plan", "p.safetensors"], ["p.safetensors", "moa-inspect profile"]),
            (["plan", "out"], ["out", "moa-inspect front"]),
            (["plan", "."], ["folder of plans", "moa-inspect plans ."]),
            (["diff", "uniform.json"], ["1 given", "two"]),
            (["diff", "uniform.json", "uniform.json", "uniform.json"], ["3 given", "two"]),
            (["diff", "uniform.json", "other.json"], ["other.json", "another model", "num_hidden_layers: 3 != 2"]),
            (["diff", "uniform.json", "p.safetensors"], ["p.safetensors", "moa-inspect profile"]),
            (["uniform.json", "nowhere.json"], ["nowhere.json", "No such file"]),
            (["uniform.json", "--lengths", "0"], ["lengths", "over 0"]),
            (["p.safetensors", "--lengths", "600"], ["600", "choose from 512, 1024"]),
            (["p.safetensors", "--criterion", "squard"], ["did you mean 'squared'"]),
            (["uniform.json", "--html", "x.html", "--heads", "7-2"], ["'7-2'", "LAYER:HEAD"]),
            (["uniform.json", "--html", "x.html", "--heads", "7:2"], ["layer 7 is out of range", "0 to 2"]),
            (["p.safetensors", "--html", "x.html", "--heads", "0:5"], ["KV head 5 is out of range", "0 to 1"]),
            (["uniform.json", "--heads", "0:1"], ["heads", "give html"]),
            (["uniform.json", "--html", "x.html", "--front", "nowhere"], ["nowhere", "no front/plan-*.json"]),
            (["uniform.json", "--html", "x.html", "--profile", "uniform.json"], ["it is a plan, no profile"]),
            (["uniform.json", "--html", "out"], ["html", "is a folder"]),
            (["fronnt"], ["did you mean 'front'"]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_is_told_in_one_line(self, call, folder, monkeypatch, tiny_signature, arguments, says):
        other = tiny_signature.model_copy(update={"num_hidden_layers": 2})
        Plan.uniform(SpanRule(300, 0), other).save(folder / "other.json")
        monkeypatch.chdir(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        status, _, err = call(*arguments)
        assert status == 2
        assert len(err.splitlines()) == 1, err
        assert err.startswith("moa-inspect")
        for words in says:
            assert words in err, err
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


class TestEngines:
    def test_written_with_what_is_lost_and_read_back(self, call, folder):
        plan, windows = folder / "out" / "plan.json", folder / "windows.yaml"
        status, out, err = call(plan, "--save", windows, "--format", "tensorrt-llm", "--window-length", 1024)
        assert status == 0, err
        assert "as TensorRT-LLM runs it: one constant window per layer" in out
        assert f"plan written to {windows}" in out
        status, out, err = call(windows, "--model", plan, "--bits", 4, 8, "--save", folder / "run.json")
        assert (status, out) == (2, "")
        assert "keys in 4 bits need transforms that were measured on it" in err
        status, out, err = call(windows, "--model", plan, "--bits", 8, "--save", folder / "run.json")
        assert status == 0, err
        assert Plan.load(folder / "run.json").tiers[0] == [(8, 8)] * 2

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--window-length", 5), "window_length: it is for writing; give save, too"),
            (("--format", "mlxx", "--save", "x"), "format: 'mlxx' is unknown (did you mean 'mlx'?)"),
            (
                ("--format", "kvtuner", "--window-length", 5, "--save", "x"),
                "window_length: it is for formats of engines",
            ),
            (("--format", "mlx", "--window-length", 0, "--save", "x"), "window_length: 0 is out of range"),
            (("--format", "mlx", "--save", "x", "--profile", "p.safetensors"), "profile: it is for a page"),
            (("--bits", 8), "bits: it is for plans of other tools"),
        ],
    )
    def test_bad_input_is_one_line(self, call, folder, words, message):
        status, out, err = call(folder / "uniform.json", *words)
        assert (status, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1


class TestMemory:
    def test_dense_and_under_the_plan_and_what_fits(self, call, folder):
        words = ("--memory", "true", "--weights-bytes", 2**30, "--context", "1k", 2048, "--batch", 8, "--card", 1, 2)
        status, out, err = call(folder / "uniform.json", *words)
        assert status == 0, err
        assert "GiB for 8 sequences, dense and under the plan in transformers" in out
        assert [line.split("│")[1].strip() for line in out.splitlines() if "│" in line] == ["1024", "2048", *"1122"]
        assert "none" in out, "1 GiB is full of weights"
        assert "Span in tokens" not in out
        assert call(folder / "uniform.json", *words, "--engine", "vllm")[0] == 0

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--memory", "true"), "memory: nothing tells the size of the weights"),
            (("--memory", "true", "--profile", "p.safetensors"), "No such file"),
            (("--context", "32k"), "context: it is for the table of memory; give memory, too"),
            (("--batch", 2), "batch: it is for the table of memory"),
            (("--memory", "true", "--weights-bytes", 1, "--context", "32kk"), "context: '32kk' is no whole number"),
            (("--memory", "true", "--weights-bytes", 1, "--card", 0), "card: 0 is out of range"),
            (("--memory", "true", "--weights-bytes", 1, "--engine", "sglang"), "engine: 'sglang' is unknown"),
        ],
    )
    def test_bad_input_is_one_line(self, call, folder, words, message):
        status, _, err = call(folder / "uniform.json", *words)
        assert status == 2
        assert message in err
        assert len(err.splitlines()) == 1
