"""PEFT's adapters: a folder with one is a model, a PeftModel is what it adapts; virtual tokens are refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moa_search import load_model
from moa_search.errors import ConfigError, ModelNotFoundError, ModelUnsupportedError
from moa_search.modeling.loading import load_config
from moa_search.modeling.support import require_attention_interface
from moa_search.modeling.wrappers import adapted_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # torch.compile
]

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def base(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


WEIGHTS = {
    "lora": lambda peft: peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False),
    "dora": lambda peft: peft.LoraConfig(r=4, target_modules=["v_proj"], use_dora=True, init_lora_weights=False),
    "loha": lambda peft: peft.LoHaConfig(r=2, target_modules=["q_proj", "o_proj"], init_weights=False),
    "ia3": lambda peft: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
}
PROMPTS = {
    "prefix tuning": lambda peft: peft.PrefixTuningConfig(num_virtual_tokens=4),
    "prompt tuning": lambda peft: peft.PromptTuningConfig(num_virtual_tokens=4),
    "p-tuning": lambda peft: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8),
}


def adapt(peft, base, config):
    torch.manual_seed(1)
    config.task_type = "CAUSAL_LM"
    return peft.get_peft_model(base, config).eval()


def save(adapted, folder, base_dir):
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = str(base_dir)
    adapted.save_pretrained(folder, save_embedding_layers=True)
    return str(folder)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_an_adapters_folder_is_a_model(peft, base, tiny_model_dir, tmp_path, kind):
    with torch.no_grad():
        dense = base(IDS).logits
        adapted = adapt(peft, base, WEIGHTS[kind](peft))
        expected = adapted(IDS).logits
    folder = save(adapted, tmp_path / "adapter", tiny_model_dir)
    model, tokenizer = load_model(folder, dtype="float32")
    assert not torch.allclose(dense, expected, atol=1e-4)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert tokenizer.decode(tokenizer("words")["input_ids"]) == "words"
    require_attention_interface(model)
    assert load_config(folder).num_hidden_layers == model.config.num_hidden_layers


def test_tokens_that_were_added_with_the_adapter(peft, base, tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    size = base.get_input_embeddings().weight.shape[0]
    tokenizer.add_tokens([f"<new{number}>" for number in range(size - len(tokenizer) + 3)])
    base.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], init_lora_weights=False
    )
    adapted = adapt(peft, base, config)
    ids = tokenizer("one <new2> two", return_tensors="pt").input_ids
    expected = adapted(ids).logits
    folder = save(adapted, tmp_path / "adapter", tiny_model_dir)
    tokenizer.save_pretrained(folder)
    model, loaded = load_model(folder, dtype="float32")
    assert loaded("one <new2> two")["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_are_refused(peft, base, tiny_model_dir, tmp_path, kind):
    adapted = adapt(peft, base, PROMPTS[kind](peft))
    with pytest.raises(ModelUnsupportedError, match="virtual tokens"):
        adapted_model(adapted)
    with pytest.raises(ModelUnsupportedError, match="virtual tokens"):
        load_model(save(adapted, tmp_path / "adapter", tiny_model_dir))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_peft_model_is_what_it_adapts(peft, base, kind):
    adapted = adapt(peft, base, WEIGHTS[kind](peft))
    found = adapted_model(adapted)
    assert found is base
    torch.testing.assert_close(found(IDS).logits, adapted(IDS).logits)
    with pytest.raises(ModelUnsupportedError, match=r"give what it wraps, model\.get_base_model\(\)"):
        require_attention_interface(adapted)


def test_a_plain_model_is_itself(base):
    assert adapted_model(base) is base


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, torch.compile])
def test_other_wrappers_are_refused_with_the_way_in(base, wrapper):
    with pytest.raises(ModelUnsupportedError, match=r"give what it wraps, model\.(module|_orig_mod)"):
        require_attention_interface(wrapper(base))


class TestDamaged:
    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"base_model_name_or_path": null}'])
    def test_an_adapter_that_names_no_base(self, tmp_path, content):
        (tmp_path / "adapter_config.json").write_text(content)
        with pytest.raises(ModelNotFoundError, match="names no base_model_name_or_path"):
            load_model(str(tmp_path))

    def test_a_base_that_is_not_there(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/no/such/base"}))
        with pytest.raises(ModelNotFoundError, match="its base model can't be found: model '/no/such/base'"):
            load_model(str(tmp_path))

    def test_an_adapter_of_an_adapter(self, tmp_path):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
        with pytest.raises(ModelNotFoundError, match="is an adapter itself"):
            load_model(str(tmp_path))

    def test_without_peft(self, tiny_model_dir, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model_dir)}))
        with pytest.raises(ConfigError, match="is an adapter, which needs peft; pip install peft"):
            load_model(str(tmp_path), dtype="float32")
