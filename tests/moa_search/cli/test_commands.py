"""The four commands, run as a user runs them, on a tiny model."""

import inspect as introspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from moa_search import Plan, api
from moa_search.cli import evaluate, inspect, profile, search
from moa_search.cli.command import parse, parser_of
from moa_search.cli.parser import first_of
from moa_search.errors import ConfigError

MODULES = {"moa-profile": profile, "moa-search": search, "moa-eval": evaluate, "moa-inspect": inspect}
COMMANDS = {name: getattr(module, "MAIN", inspect.COMMANDS["plan"]) for name, module in MODULES.items()} | {
    f"{name} {other}": command for name, module in MODULES.items() for other, command in module.COMMANDS.items()
}


def parsed(program, *arguments):
    """First argument and options of a command line."""
    return parse(program, COMMANDS[program], list(map(str, arguments)))


@pytest.fixture
def call(run_main):
    """Run a command; returns exit status, output and errors."""
    return lambda program, *arguments: run_main(MODULES[program.split()[0]].main, program, *arguments)


def test_from_profile_to_scores(call, tiny_model_dir, tmp_path):
    made = tmp_path / "profile.safetensors"
    status, out, err = call(
        "moa-profile",
        "--model",
        tiny_model_dir,
        "--lengths",
        300,
        600,
        "--samples",
        2,
        "--answers",
        "dataset",
        "--output",
        made,
    )
    assert status == 0, err
    assert "passkey, copy; the data's answers" in out
    assert "2 samples measured" in out or "4 samples measured" in out
    status, out, err = call("moa-search", made, "--density", 0.5, "--output", tmp_path / "half")
    assert status == 0, err
    assert (tmp_path / "half" / "front" / "front.csv").exists()
    plan = Plan.load(tmp_path / "half" / "plan.json")
    assert plan.density(300) <= 0.5
    assert plan.density(600) <= 0.5
    scores = tmp_path / "scores.csv"
    status, out, err = call(
        "moa-eval", "--model", tiny_model_dir, "--plan", tmp_path / "half" / "plan.json", "--lengths", 300,
        "--samples", 2, "--output", scores,
    )  # fmt: skip
    assert status == 0, err
    assert set(pd.read_csv(scores)["variant"]) == {"dense", "uniform like half", "half"}
    assert "passkey at 300 tokens, teacher-forced: mean of 2 items" in out
    picture = tmp_path / "spans.png"
    status, out, err = call("moa-inspect", tmp_path / "half" / "plan.json", "--output", picture)
    assert status == 0, err
    assert "exact search on signed" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plans_of_other_tools_are_shown_and_converted(call, tmp_path):
    golden = Path(__file__).parents[2] / "golden"
    model = golden / "moa-plan-1.json"
    status, out, err = call(
        "moa-inspect", golden / "moa-alphas-betas.json", "--model", model, "--save", tmp_path / "plan.json"
    )
    assert status == 0, err
    assert "imported from MoA" in out
    assert "density per query head -> per KV head: " in out
    assert f"plan written to {tmp_path / 'plan.json'}" in out
    status, out, err = call(
        "moa-inspect", tmp_path / "plan.json", "--lengths", 4096, "--format", "moa", "--save", tmp_path / "moa.json"
    )
    assert status == 0, err
    assert "density per query head -> per KV head: " in out, "the file still says so"
    assert json.loads((tmp_path / "moa.json").read_text())["alphas"][0] == [1024, 1024, 0, 0]
    numbers = "layers=2,heads=4,kv_heads=2,head_dim=16"
    status, out, err = call("moa-inspect", golden / "duo-attention", "--model", numbers, "--sparsity", 0.75)
    assert status == 0, err
    assert "sparsity 0.75: 1 of 4 KV heads are dense, the others keep 64 + 256 tokens" in out


def test_search_twice_is_byte_identical(call, profiled, tmp_path):
    for name in ("one", "two"):
        assert call("moa-search", profiled, "--density", 0.5, "--output", tmp_path / name)[0] == 0
    one, two = ((tmp_path / name / "plan.json").read_bytes() for name in ("one", "two"))
    assert one == two


class TestOptions:
    @pytest.mark.parametrize("program", COMMANDS)
    def test_help_is_quick_to_import_and_names_every_argument(self, program):
        """No torch, transformers or pandas is imported for ``--help``."""
        module = MODULES[program.split()[0]].__name__
        code = (
            f"import sys; sys.argv = {[*program.split(), '--help']}\n"
            f"from {module} import main\n"
            "try: main()\n"
            "except SystemExit: pass\n"
            "print(sorted({'torch', 'transformers', 'pandas', 'matplotlib', 'highspy', 'datasets'} & set(sys.modules)))"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.splitlines()[-1] == "[]"
        for name in parser_of(program, COMMANDS[program]).names:
            assert f"--{name.replace('_', '-')} " in out

    @pytest.mark.parametrize("program", COMMANDS)
    def test_help_has_groups_examples_that_parse_and_no_python(self, program, capsys):
        command = COMMANDS[program]
        help_text = parser_of(program, command).format_help()
        assert "general:" in help_text
        for words in ("type:", "null", "Literal", "Python"):
            assert words not in help_text
        assert command.examples
        for example in command.examples:
            assert example in help_text
            words = shlex.split(example)[1:]
            named = words[0] in MODULES[program.split()[0]].COMMANDS
            parsed(program, *words[named:])

    def test_flag_yaml_key_and_keyword_are_one(self, tmp_path):
        """Each argument of each function can be given as a flag and as a YAML key, with the same result."""
        values = {
            "model": "demo", "lengths": [512, 777], "samples": 3, "sources": ["copy"], "output": "x",
            "dtype": "float16", "device": "cpu", "sink": 5, "block": 7, "row_buckets": 9, "checkpointing": False,
            "seed": 11, "tasks": ["copy"], "density": [0.3, 0.4], "budget_lengths": [99, 100],
            "criterion": "signed", "searcher": "uniform",
            "time_limit_s": 1.5, "front_steps": 2, "plan": ["a", "b"], "baselines": ["dense"],
            "profile": "p", "answers": "dataset", "max_answer_tokens": 9, "chat": "never", "save_samples": "s",
            "resume": False, "device_map": "auto", "profiles": ["a", "b"], "folder": "f",
            "densities": [0.1, 0.2], "budget": ["kv=2GiB@32k"], "hardware": "h200", "weights_bytes": 12,
            "anchor": "prompt", "rules_per_layer": 2, "length_weights": ["512=1"], "predict_lengths": [4096],
            "robust": 0.5, "min_span": 64, "layer_floor": ["0=1.0"], "validate": "demo", "searchers": ["moa", "duo"],
            "criteria": ["squared"], "trials": 7, "sampler": "random", "storage": "s.journal", "study": "n",
            "tiers": [8, 4], "kv_share": [0.5], "kv_shares": [0.1, 0.2], "transforms": "p", "trust_remote_code": True,
            "name": "n", "tile_query": 64, "tile_key": 64,
            "workers": 2, "devices": ["cuda:1"], "impl": "torch",
            "fold_lengths": [1024, 4096], "threshold": 0.4, "sparsity": 0.5, "recent": 256, "save": "s",
            "random_weights": "c.json", "layers": 2, "ways": ["plan"], "batch": ["1", "largest"], "decode_tokens": 8,
            "repetitions": 2, "prefill_chunk": 512, "memory_limit_gib": 1.5,
            "format": "moa", "reanchor": True, "depths": [0.0, 0.5],
            "against": ["dense"], "windows": False, "refine": 2,
            "include_path": "i", "builtin": True, "length": 99, "limit": 8, "num_fewshot": 1, "batch_size": 2,
            "apply_chat_template": True,
            "html": "h", "heads": ["7:2"], "front": "f", "plans": ["a", "b"],
            "repo": "org/plans", "base_model": "org/m", "license": "mit", "private": True, "revision": "v1",
            "message": "m", "create_pr": True, "groups": 9, "overwrite": True, "memory": True, "context": [4096],
            "engine": "vllm", "card": [24.0, 80.0], "window_length": 512, "bits": [4, 2], "vllm": True,
            "rivals": ["int4"], "rivals_python": "python", "questions": ["known"],
        }  # fmt: skip
        own = {
            ("moa-inspect", "plan"): "a",
            ("moa-inspect", "batch"): 8,
            ("moa-inspect plan", "batch"): 8,
            ("moa-inspect plan", "plan"): "a",
            ("moa-search push", "plans"): "a",
            ("moa-eval", "answers"): "generated",
            ("moa-eval report", "answers"): "generated",
            ("moa-eval report", "samples"): [3, 4],
        }
        for program, command in COMMANDS.items():
            first, kind = first_of(command.function).name, command.function.options
            names = [first, *kind.model_fields]
            wanted = {name: own.get((program, name), values[name]) for name in names}
            flags = []
            for name, value in wanted.items():
                parts = [str(v) for v in (value if isinstance(value, list) else [value])]
                flags += [f"--{name.replace('_', '-')}", *parts]
            config = tmp_path / f"{program}.yaml"
            config.write_text(yaml.safe_dump(wanted))
            given = wanted.pop(first)
            by_keyword = kind(**wanted)
            assert parsed(program, *flags) == parsed(program, "--config", config) == (given, by_keyword)
            for name, value in wanted.items():
                read = getattr(by_keyword, name)
                assert (read == {512: 1.0} and value == ["512=1"]) or read == value, (program, name)
                assert name in introspect.signature(command.function).parameters

    @pytest.mark.parametrize(
        ("program", "text", "wanted"),
        [
            ("moa-search", "density: 0.25", {"density": [0.25]}),
            ("moa-search", "budget: kv=2MiB@2048", {"budget": ["kv=2MiB@2048"]}),
            ("moa-search", "predict_lengths: 4096", {"predict_lengths": [4096]}),
            ("moa-search", "length_weights: {1024: 1, 2048: 3}", {"length_weights": {1024: 1.0, 2048: 3.0}}),
            ("moa-search", "length_weights: 1024=1", {"length_weights": {1024: 1.0}}),
            ("moa-search", "layer_floor: {0-1: 1.0}", {"layer_floor": ["0-1=1.0"]}),
            ("moa-search", "density:\nrobust: 1e-1", {"density": [], "robust": 0.1}),
            ("moa-profile", "sources: copy\nlengths: 512", {"sources": ["copy"], "lengths": [512]}),
            ("moa-eval", "tasks: copy\ndepths: 0.5\nplan: a.json", {"depths": [0.5], "plan": ["a.json"]}),
            ("moa-eval", "baselines: no\ndevice: 2026-11-25", {"baselines": ["no"], "device": "2026-11-25"}),
            ("moa-eval report", "model: demo\nsamples: 3\nagainst: dense", {"samples": [3], "against": ["dense"]}),
            ("moa-eval throughput", "batch: 4\nways: plan\ndensity: 0.5", {"batch": ["4"], "ways": ["plan"]}),
            ("moa-search tune", "criteria: signed\nmodel: demo\nstudy: 2026", {"study": "2026"}),
            ("moa-inspect plan", "heads: 7:2\nhtml: x.html", {"heads": ["7:2"]}),
            ("moa-inspect plan", "fold_lengths: 1024", {"fold_lengths": [1024]}),
        ],
    )  # fmt: skip
    def test_one_value_in_yaml_is_a_list_of_one(self, tmp_path, program, text, wanted):
        config = tmp_path / "c.yaml"
        config.write_text(text)
        command = COMMANDS[program]
        first = [] if command.first or "model" in text else [f"--{first_of(command.function).name}", "p"]
        if program == "moa-search tune":
            first = ["--profile", "p"]
        output = ["--output", "x"] if "output" in command.function.options.model_fields else []
        _, options = parsed(program, "--config", config, *first, *output)
        assert {name: getattr(options, name) for name in wanted} == wanted

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("lengths: 512\nlengths: 1024", "the key 'lengths' stands 2 times"),
            ("- lengths", "write one per line"),
            ("512: 1024", "unknown key '512'"),
            ("lengths: !!python/name:os.system x", "not a YAML file of options"),
            ("lengths: [1024", "not a YAML file of options"),
            ("resume: perhaps", "resume: 'perhaps' is neither true nor false"),
            ("lengths: [1024, many]", "lengths: 'many' is no whole number"),
        ],
    )
    def test_configuration_files_that_say_something_else(self, tmp_path, text, says):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=re.escape(says)):
            parsed("moa-profile", "demo", "--output", "x", "--config", tmp_path / "c.yaml")

    def test_flag_beats_yaml_beats_default(self, tmp_path):
        config = tmp_path / "profile.yaml"
        config.write_text("samples: 5\nseed: 6\n")
        _, options = parsed("moa-profile", "demo", "--output", "x", "--config", config, "--seed", "7")
        assert (options.samples, options.seed, options.row_buckets) == (5, 7, 32)

    @pytest.mark.parametrize(
        ("program", "folder"),
        [
            ("moa-profile", "profile"),
            ("moa-search", "search"),
            ("moa-eval", "eval"),
            ("moa-eval report", "eval/report"),
            ("moa-eval throughput", "eval/throughput"),
        ],
    )
    def test_shipped_configurations_parse(self, program, folder):
        files = sorted((Path(__file__).parents[3] / "configs" / folder).glob("*.yaml"))
        assert files
        for file in files:
            missing = ["--profile", "p"] if program == "moa-search" else []
            missing += [] if program in ("moa-eval", "moa-eval throughput", "moa-eval report") else ["--output", "x"]
            parsed(program, "--config", file, *missing)


class TestBadInput:
    """One clear line, exit status 2, nothing written."""

    @pytest.fixture
    def check_refused(self, call, tmp_path):
        def check(program, *arguments, says):
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            status, _, err = call(program, *arguments)
            lines = [line for line in err.splitlines() if line.startswith(program)]
            assert status == 2
            assert len(lines) == 1
            for words in says:
                assert words in lines[0], lines[0]
            assert "Traceback" not in err
            assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

        return check

    @pytest.mark.parametrize("name", ["no/such-model", "./missing", "missing.gguf", "a/b/c"])
    def test_unknown_model(self, check_refused, tmp_path, name):
        check_refused("moa-profile", "--model", name, "--output", tmp_path / "p.safetensors", says=[name])

    def test_model_that_is_not_causal(self, check_refused, tmp_path):
        from transformers import BertConfig, BertModel

        BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=99)
        ).save_pretrained(tmp_path / "bert")
        check_refused(
            "moa-profile", "--model", tmp_path / "bert", "--output", tmp_path / "p.safetensors",
            says=["bert", "not a causal language model"],
        )  # fmt: skip

    def test_model_that_ignores_the_attention_interface(self, check_refused, tmp_path, tiny_model_dir):
        import shutil

        from transformers import FalconConfig, FalconForCausalLM

        folder = tmp_path / "falcon"
        shutil.copytree(tiny_model_dir, folder)
        FalconForCausalLM(
            FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=256)
        ).save_pretrained(folder)
        check_refused(
            "moa-profile", "--model", folder, "--lengths", 300, "--samples", 1, "--output", tmp_path / "p.safetensors",
            says=["Falcon", "AttentionInterface"],
        )  # fmt: skip

    def test_plan_of_another_model(self, check_refused, tmp_path, tiny_model_dir, tiny_plan):
        tiny_plan.save(tmp_path / "plan.json")
        check_refused(
            "moa-eval", "--model", tiny_model_dir, "--plan", tmp_path / "plan.json", "--lengths", 300,
            says=["another model", "num_hidden_layers: 3 != 2"],
        )  # fmt: skip

    def test_truncated_profile(self, check_refused, profiled, tmp_path):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(profiled.read_bytes()[:-100])
        check_refused("moa-search", broken, "--output", tmp_path / "out", says=["broken.safetensors", "truncated"])

    def test_foreign_file(self, check_refused, tmp_path):
        (tmp_path / "plan.json").write_text(json.dumps({"layers": [[1]]}))
        check_refused("moa-inspect", tmp_path / "plan.json", says=["plan.json", "not a moa-search plan"])

    def test_plan_of_another_tool(self, check_refused, tmp_path, tiny_model_dir):
        (tmp_path / "moa.json").write_text(json.dumps({"alphas": [[1]], "betas": [[0.5]]}))
        inspected = ("moa-inspect", tmp_path / "moa.json")
        check_refused(*inspected, says=["moa.json", "doesn't say which model", "give model"])
        check_refused(*inspected, "--model", tiny_model_dir, says=["it has 1 layers, the model 2"])
        check_refused(*inspected, "--model", "layers=1,heads=one", says=["layers=1,heads=one", "kv_heads"])
        check_refused(*inspected, "--format", "duo", says=["format", "give save"])
        check_refused(*inspected, "--format", "duoo", "--save", tmp_path / "x", says=["did you mean 'duo'"])

    def test_missing_file(self, check_refused, tmp_path):
        check_refused(
            "moa-search", tmp_path / "nowhere", "--output", tmp_path / "out", says=["nowhere", "No such file"]
        )

    def test_unknown_yaml_key_suggests_the_nearest(self, check_refused, tmp_path):
        (tmp_path / "c.yaml").write_text("lenghts: [1024]\n")
        check_refused("moa-profile", "--config", tmp_path / "c.yaml", says=["'lenghts'", "did you mean 'lengths'"])

    def test_broken_yaml(self, check_refused, tmp_path):
        (tmp_path / "c.yaml").write_text("lengths: [1024\n  samples: }")
        check_refused("moa-profile", "--config", tmp_path / "c.yaml", says=["c.yaml"])

    def test_missing_config_file(self, check_refused, tmp_path):
        check_refused("moa-profile", "--config", tmp_path / "none.yaml", says=["none.yaml"])

    def test_unknown_option(self, check_refused):
        check_refused("moa-profile", "--lenghts", 5, says=["--lenghts", "lengths"])

    def test_values_of_the_wrong_kind(self, check_refused, tmp_path):
        (tmp_path / "c.yaml").write_text("lengths: {512: 1024}\nmodel: demo\noutput: x\n")
        check_refused("moa-profile", "--config", tmp_path / "c.yaml", says=["lengths: ", "is no whole number"])
        check_refused(
            "moa-profile", "demo", "--output", "x", "--samples", "many", says=["samples: 'many' is no whole number"]
        )

    def test_unknown_choice(self, check_refused, profiled, tmp_path):
        check_refused(
            "moa-search", profiled, "--criterion", "squard", "--output", tmp_path / "out",
            says=["criterion", "did you mean 'squared'"],
        )  # fmt: skip

    @pytest.mark.parametrize("density", ["0", "1.5", "-0.1", "nan"])
    def test_density_out_of_range(self, check_refused, profiled, tmp_path, density):
        check_refused(
            "moa-search", profiled, f"--density={density}", "--output", tmp_path / "out", says=["density", density]
        )

    def test_infeasible_budget_is_named(self, check_refused, profiled, tmp_path):
        check_refused(
            "moa-search", profiled, "--density", 0.05, "--output", tmp_path / "out",
            says=["density=0.05@300 can't be met", "already take 0.16"],
        )  # fmt: skip

    def test_length_over_the_context(self, check_refused, tiny_model_dir, tmp_path):
        check_refused(
            "moa-profile", "--model", tiny_model_dir, "--lengths", 4000, "--output", tmp_path / "p.safetensors",
            says=["4000", "context of 2048"],
        )  # fmt: skip

    def test_length_too_short_for_the_task(self, check_refused, tiny_model_dir, tmp_path):
        check_refused(
            "moa-profile", "--model", tiny_model_dir, "--lengths", 20, "--output", tmp_path / "p.safetensors",
            says=["20 tokens"],
        )  # fmt: skip

    def test_loss_that_is_not_finite(self, check_refused, tiny_model_dir, tmp_path):
        import shutil

        from safetensors.torch import load_file, save_file

        folder = tmp_path / "nan"
        shutil.copytree(tiny_model_dir, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][:] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        check_refused(
            "moa-profile", "--model", folder, "--lengths", 300, "--samples", 1, "--answers", "dataset",
            "--output", tmp_path / "p.safetensors",
            says=["loss of sample 0", "nan"],
        )  # fmt: skip

    def test_model_that_never_answers_rightly(self, check_refused, tiny_model_dir, tmp_path):
        check_refused(
            "moa-profile", "--model", tiny_model_dir, "--lengths", 300, "--samples", 2,
            "--output", tmp_path / "p.safetensors",
            says=["passkey", "--answers dataset"],
        )  # fmt: skip

    def test_required_options(self, check_refused):
        check_refused("moa-profile", "--model", "demo", says=["--output is required"])
        check_refused("moa-search", "--output", "x", says=["profile is required"])
        check_refused("moa-inspect", says=["plan is required"])

    def test_output_that_cannot_be_written(self, check_refused, tmp_path):
        (tmp_path / "file").write_text("")
        target = tmp_path / "file" / "p.safetensors"
        check_refused("moa-profile", "--model", "demo", "--output", target, says=["can't be written"])


def test_interrupt_leaves_the_old_file(call, monkeypatch, tiny_model_dir, tmp_path):
    target = tmp_path / "p.safetensors"
    target.write_bytes(b"old")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moa_search.profiling.measure.SampleMeter._backward", interrupt)
    status, _, err = call(
        "moa-profile", "--model", tiny_model_dir, "--lengths", 300, "--answers", "dataset", "--output", target
    )
    assert status == 130
    assert "the same command resumes" in err
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]
    assert target.read_bytes() == b"old"


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["moa-inspect", str(tmp_path / "none.json"), "--debug"])
    with pytest.raises(Exception, match="No such file"):
        inspect.main()


def test_progress_reports_all_tokens(tiny_model_dir, bars):
    api.profile_model(str(tiny_model_dir), lengths=[300], samples=2, answers="dataset")
    assert bars["Calibrating"][:2] == [(300, 600), (600, 600)]
    assert bars["Profiling"][1:3] == [(300, 600), (600, 600)]


def test_python_and_command_agree(profiled, tmp_path):
    front = api.search_front(str(profiled), density=[0.5])
    plan = api.search_plan(str(profiled), density=0.5)
    assert plan == front.chosen
    assert np.isfinite([m.loss for m in plan.predicted]).all()
