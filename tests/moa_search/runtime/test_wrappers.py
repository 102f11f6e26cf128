"""Plans on models inside others: PEFT's, parallel and compiled ones; and what is taken for a plan."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

import moa_search
from moa_search import from_pretrained
from moa_search.errors import (
    ConfigError,
    ModelMismatchError,
    ModelNotFoundError,
    ModelUnsupportedError,
    PlanFormatError,
)
from moa_search.runtime import MoACache, applied, apply_plan, remove_plan

from .explicit import explicit, greedy, tiny_model, tiny_plan, tokens

GREEDY = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


def answer(model):
    return model.generate(input_ids=tokens(1, 60), **GREEDY).sequences


def forms(plan, folder):
    plan.save(folder / "plan.json")
    return {
        "Plan": plan,
        "str": str(folder / "plan.json"),
        "Path": folder / "plan.json",
        "dict": json.loads(plan.dumps()),
        "dump": plan.model_dump(mode="json", by_alias=True),
    }


@pytest.mark.parametrize("form", ["Plan", "str", "Path", "dict", "dump"])
def test_a_plan_is_taken_in_every_form(form, tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    given = forms(plan, tmp_path)[form]
    expected = greedy(explicit(model, plan), tokens(1, 60), 12)
    assert torch.equal(apply_plan(model, given).generate(tokens(1, 60), **GREEDY).sequences, expected)
    cache = MoACache(model.config, given)
    assert torch.equal(model.generate(tokens(1, 60), past_key_values=cache, **GREEDY).sequences, expected)
    remove_plan(model)
    with applied(model, given):
        assert torch.equal(model.generate(tokens(1, 60), **GREEDY).sequences, expected)


def test_what_is_no_plan_is_refused_in_one_line(tmp_path):
    model = tiny_model()
    for wrong, error, words in (
        (3, ConfigError, "a int is no plan"),
        (None, ConfigError, "NoneType is no plan"),
        ([tiny_plan(model)], ConfigError, "list is no plan"),
        ({"alphas": []}, PlanFormatError, "not a moa-search plan"),
        ({"schema": {1}}, PlanFormatError, "set"),
        (tmp_path / "missing.json", ConfigError, "missing.json"),
        (tmp_path, ConfigError, "directory"),
    ):
        with pytest.raises(error, match=words) as caught:
            apply_plan(model, wrong)
        assert "\n" not in str(caught.value)


def test_a_plan_is_applied_by_itself_for_a_block():
    model = tiny_model()
    plan = tiny_plan(model)
    with plan.applied(model) as under:
        assert under is model
        assert type(model.generate(tokens(1, 20), **GREEDY).past_key_values) is MoACache
    assert type(model.generate(tokens(1, 20), **GREEDY).past_key_values) is DynamicCache
    with moa_search.applied(model, plan), plan.applied(model, impl="torch"):
        assert type(model(tokens(1, 5)).past_key_values) is MoACache


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # the compiler asks by the old name
@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_other_wrappers_are_refused_with_the_way(wrap):
    model = tiny_model()
    with pytest.raises(ModelUnsupportedError, match=r"give model\.(module|_orig_mod) instead"):
        apply_plan(wrap(model), tiny_plan(model))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT asks by the old name
class TestPeft:
    """Adapters of PEFT, in whatever order they and the plan come."""

    @pytest.fixture(autouse=True)
    def peft(self):
        return pytest.importorskip("peft", reason="needs PEFT")

    @staticmethod
    def lora(peft, model, kind="LoraConfig", **options):
        torch.manual_seed(7)
        config = getattr(peft, kind)(target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        return peft.get_peft_model(model, config).eval()

    @pytest.mark.parametrize("order", ["plan on the adapter's model", "plan before", "plan on the model within"])
    def test_lora_and_plan_in_any_order(self, peft, order):
        model = tiny_model()
        plan = tiny_plan(model)
        if order == "plan before":
            apply_plan(model, plan)
        adapted = self.lora(peft, model, r=4, init_lora_weights=False)
        if order == "plan on the adapter's model":
            assert apply_plan(adapted, plan) is adapted
        if order == "plan on the model within":
            apply_plan(adapted.get_base_model(), plan)
        expected = greedy(explicit(adapted.get_base_model(), plan), tokens(1, 60), 12)
        result = adapted.generate(input_ids=tokens(1, 60), **GREEDY)
        assert torch.equal(result.sequences, expected)
        assert type(result.past_key_values) is MoACache
        assert type(adapted(input_ids=tokens(1, 60)).past_key_values) is MoACache
        assert torch.equal(adapted.merge_and_unload().generate(tokens(1, 60), **GREEDY).sequences, expected)

    @pytest.fixture
    def folders(self, peft, tmp_path):
        """An adapter's folder, its base model's folder, a plan made for the base, and what it generates under it."""
        model = tiny_model()
        plan = tiny_plan(model)
        model.save_pretrained(tmp_path / "base")
        adapted = self.lora(peft, model, r=4, init_lora_weights=False)
        adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        adapted.save_pretrained(tmp_path / "adapter")
        with applied(adapted, plan):
            return tmp_path / "adapter", tmp_path / "base", plan, answer(adapted)

    @pytest.mark.parametrize("where", ["given", "beside the adapter", "beside the base"])
    def test_an_adapters_folder_is_loaded_under_a_plan_for_its_base(self, peft, folders, where):
        adapter, base, plan, expected = folders
        options = {"plan": plan} if where == "given" else {}
        if where == "beside the adapter":
            plan.save(adapter / "moa_plan.json")
        elif where == "beside the base":
            with applied(tiny_model(), plan) as model:
                model.save_pretrained(base)
        loaded = from_pretrained(adapter, dtype=torch.float64, **options)
        assert torch.equal(answer(loaded), expected)
        assert not torch.equal(expected, answer(apply_plan(tiny_model(), plan)))

    def test_an_adapters_folder_that_cant_be_loaded(self, peft, folders, tmp_path):
        adapter, base, plan, _ = folders
        with pytest.raises(ConfigError, match=r"neither moa_plan\.json nor its config\.json"):
            from_pretrained(adapter)
        with pytest.raises(ModelMismatchError, match="num_hidden_layers: 2 != 3"):
            from_pretrained(adapter, plan=tiny_plan(tiny_model(num_hidden_layers=2)))
        base.rename(tmp_path / "elsewhere")
        with pytest.raises(ModelNotFoundError, match="its base model can't be found"):
            from_pretrained(adapter, plan=plan)
        (adapter / "adapter_config.json").write_text("{}")
        with pytest.raises(ModelNotFoundError, match="names no base_model_name_or_path"):
            from_pretrained(adapter, plan=plan)

    def test_a_plan_comes_off_an_adapters_model_again(self, peft):
        adapted = self.lora(peft, tiny_model(), r=4, init_lora_weights=False)
        before = adapted.generate(input_ids=tokens(1, 60), **GREEDY)
        with applied(adapted, tiny_plan(adapted)):
            assert type(adapted.generate(input_ids=tokens(1, 60), **GREEDY).past_key_values) is MoACache
        after = adapted.generate(input_ids=tokens(1, 60), **GREEDY)
        assert torch.equal(after.sequences, before.sequences)
        assert type(after.past_key_values) is DynamicCache

    def test_other_adapters_of_weights_are_taken(self, peft):
        model = tiny_model()
        plan = tiny_plan(model)
        torch.manual_seed(7)
        config = peft.IA3Config(
            target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"
        )
        adapted = apply_plan(peft.get_peft_model(model, config).eval(), plan)
        expected = greedy(explicit(adapted.get_base_model(), plan), tokens(1, 60), 12)
        assert torch.equal(adapted.generate(input_ids=tokens(1, 60), **GREEDY).sequences, expected)

    def test_a_mix_of_adapters_is_taken(self, peft):
        model = tiny_model()
        plan = tiny_plan(model)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = peft.PeftMixedModel(model, config).eval()
        apply_plan(adapted, plan)
        assert type(adapted.generate(input_ids=tokens(1, 60), **GREEDY).past_key_values) is MoACache

    @pytest.mark.filterwarnings("ignore:Position ids are not supported")
    def test_learned_prompts_give_what_they_give_dense(self, peft, monkeypatch):
        """In one pass, however long: PEFT counts a pass's tokens to know what to put in front."""
        from moa_search.formats import ModelSignature, Plan
        from moa_search.runtime import chunks
        from moa_search.spans import DENSE

        monkeypatch.setattr(chunks, "PREFILL_CHUNK_TOKENS", 32)
        model = tiny_model()
        torch.manual_seed(7)
        adapted = peft.get_peft_model(
            model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        ).eval()
        adapted.double()
        expected = adapted.generate(input_ids=tokens(1, 60), **GREEDY).sequences
        apply_plan(adapted, Plan.uniform(DENSE, ModelSignature.of(model.config), sink=4, block=8))
        result = adapted.generate(input_ids=tokens(1, 60), **GREEDY)
        assert torch.equal(result.sequences, expected)
        assert type(result.past_key_values) is MoACache

    def test_a_prefix_of_keys_is_refused_when_the_plan_is_applied_and_when_it_runs(self, peft):
        model = tiny_model()
        plan = tiny_plan(model)
        adapted = peft.get_peft_model(
            model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        ).eval()
        with pytest.raises(ModelUnsupportedError, match="PREFIX_TUNING"):
            apply_plan(adapted, plan)
        apply_plan(adapted.get_base_model(), plan)
        with pytest.raises(ModelUnsupportedError, match="PREFIX_TUNING"):
            adapted.generate(input_ids=tokens(1, 60), **GREEDY)
