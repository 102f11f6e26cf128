"""What stands beside a plain transformers model and a plan file: PEFT, code from the hub, paths and plain data."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from moa_search import ModelSignature, Plan, SpanRule, api, load_model
from moa_search.errors import ConfigError, ModelUnsupportedError, PlanFormatError

LENGTHS = [300]


@pytest.fixture
def loaded(tiny_model_dir):
    return load_model(str(tiny_model_dir), dtype="float32")


@pytest.fixture
def plan_file(loaded, tmp_path):
    signature = ModelSignature.of(loaded[0].config)
    path = tmp_path / "short.json"
    Plan.from_rules([[SpanRule(16, 64), SpanRule(64, 0)]] * 2, signature, sink=4, block=8).save(path)
    return path


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
class TestPeft:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    @pytest.fixture
    def adapted(self, peft, loaded):
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(loaded[0], config).eval(), loaded[1]

    def test_it_is_profiled_searched_and_evaluated_with_its_adapter(self, adapted, tiny_model_dir, tmp_path):
        profile = api.profile_model(adapted, lengths=LENGTHS, samples=2, answers="dataset")
        bare = api.profile_model(str(tiny_model_dir), lengths=LENGTHS, samples=2, answers="dataset", dtype="float32")
        assert not np.allclose(profile.by_length[300].loss, bare.by_length[300].loss)
        adapted[0].peft_config["default"].base_model_name_or_path = str(tiny_model_dir)
        adapted[0].save_pretrained(tmp_path / "adapter")
        named = api.profile_model(
            str(tmp_path / "adapter"), lengths=LENGTHS, samples=2, answers="dataset", dtype="float32"
        )
        np.testing.assert_allclose(named.by_length[300].loss, profile.by_length[300].loss, rtol=1e-5)
        items = api.evaluate_model(adapted, plan=api.search_plan(profile, density=0.5), lengths=LENGTHS, samples=1)
        assert len(set(items["variant"])) == 3
        assert type(adapted[0]).__name__ == "PeftModelForCausalLM"

    def test_virtual_tokens_are_refused(self, peft, loaded):
        config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        prefixed = (peft.get_peft_model(loaded[0], config), loaded[1])
        with pytest.raises(ModelUnsupportedError, match="PREFIX_TUNING puts virtual tokens"):
            api.profile_model(prefixed, lengths=LENGTHS, samples=2)
        with pytest.raises(ModelUnsupportedError, match="PREFIX_TUNING puts virtual tokens"):
            api.evaluate_model(prefixed, lengths=LENGTHS, samples=2, baselines=["dense"])


def test_a_model_without_its_tokenizer_is_refused(loaded):
    with pytest.raises(ConfigError, match=r"model: a LlamaForCausalLM is given; .*\(model, tokenizer\)"):
        api.evaluate_model(loaded[0], lengths=LENGTHS, samples=2, baselines=["dense"])


def test_a_path_names_a_model(tiny_model_dir):
    items = api.evaluate_model(tiny_model_dir, lengths=LENGTHS, samples=1, baselines=["dense"], dtype="float32")
    assert set(items["variant"]) == {"dense"}


class TestPlans:
    @pytest.fixture(params=["Plan", "str", "Path", "dict"])
    def given(self, request, plan_file):
        return {
            "Plan": lambda: Plan.load(plan_file),
            "str": lambda: str(plan_file),
            "Path": lambda: plan_file,
            "dict": lambda: json.loads(plan_file.read_text()),
        }[request.param]()

    def test_evaluated(self, loaded, given, plan_file):
        """One needs no list."""
        options = {"lengths": LENGTHS, "samples": 1, "tasks": ["copy"]}
        items = api.evaluate_model(loaded, plan=given, **options)
        expected = api.evaluate_model(loaded, plan=[Plan.load(plan_file)], **options)
        assert len(set(items["variant"])) == 3
        assert items["nll"].tolist() == expected["nll"].tolist()

    def test_timed(self, loaded, plan_file):
        options = {"ways": ["plan"], "lengths": [64], "decode_tokens": 2, "repetitions": 1}
        assert len(api.measure_throughput(loaded, plan=json.loads(plan_file.read_text()), **options).runs)

    def test_looked_at_compared_and_exported(self, given, plan_file, tmp_path):
        plan = Plan.load(plan_file)
        assert api.inspect_plan(given, html=str(tmp_path / "page.html")) == plan
        assert api.import_plan(given, model=plan.model) == plan
        assert api.export_plan(given, str(tmp_path / "again.json"), format="plan") == plan
        other = plan.anchored_at(512)
        assert api.diff_plans([given, other], html=str(tmp_path / "diff.html")) == [plan, other]

    def test_what_is_no_plan_is_refused_before_the_work(self, loaded, monkeypatch):
        with pytest.raises(PlanFormatError, match="not a moa-search plan"):
            api.evaluate_model(loaded, plan=[{"sink": 4}], lengths=LENGTHS, samples=1)
        with pytest.raises(ConfigError, match="a int is no plan"):
            api.evaluate_model(loaded, plan=[3], lengths=LENGTHS, samples=1)


def test_commands_refuse_a_model_with_code_of_its_own(tiny_model_dir, tmp_path):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="runs code of its own"):
        api.profile_model(str(folder))
    with pytest.raises(ConfigError, match="runs code of its own"):
        api.evaluate_model(str(folder), baselines=["dense"])
    with pytest.raises(ConfigError, match="runs code of its own"):
        api.measure_throughput(str(folder), ways=["dense"])
    with pytest.raises(ConfigError, match="runs code of its own"):
        api.measure_throughput(random_weights=str(folder), density=[0.5])
