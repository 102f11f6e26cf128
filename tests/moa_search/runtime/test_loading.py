"""What is left of a plan after a model is saved and loaded again."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
)

from moa_search import from_pretrained, load_model
from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError, UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.runtime import MoACache, applied, apply_plan, remove_plan
from moa_search.runtime.attention import register

from .explicit import SIZES, tiny_model, tiny_plan, tokens


def generate(model, **kwargs):
    model.generation_config.eos_token_id = None
    return model.generate(tokens(1, 60), max_new_tokens=30, do_sample=False, **kwargs)


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def saved(model, tmp_path):
    """A folder that a model was saved to under a plan."""
    with applied(model, tiny_plan(model)):
        model.save_pretrained(tmp_path)
    return tmp_path


def test_the_plan_is_saved_beside_the_weights(model, tmp_path):
    plan = tiny_plan(model)
    model.save_pretrained(tmp_path / "dense")
    apply_plan(model, plan)
    model.save_pretrained(tmp_path / "sparse", max_shard_size="20KB")
    written = {path.name for path in (tmp_path / "sparse").iterdir()}
    assert Plan.load(tmp_path / "sparse" / "moa_plan.json") == plan
    assert "model.safetensors.index.json" in written, "its options are passed on"
    remove_plan(model)
    model.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "dense").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert not (tmp_path / "again" / "moa_plan.json").exists()


def test_only_the_main_process_writes(model, tmp_path):
    with applied(model, tiny_plan(model)):
        model.save_pretrained(tmp_path, False)
        assert not (tmp_path / "moa_plan.json").exists()
        (tmp_path / "file").write_text("")
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "", "transformers only logs that it is no folder"


def test_a_reload_generates_the_same(model, saved):
    plan = tiny_plan(model)
    loaded = from_pretrained(saved, dtype=torch.float64)
    result = generate(loaded, return_dict_in_generate=True)
    assert type(result.past_key_values) is MoACache
    with applied(model, plan):
        assert torch.equal(result.sequences, generate(model))
    assert loaded.dtype == torch.float64
    assert not loaded.training
    assert torch.equal(generate(remove_plan(loaded)), generate(model)), "and goes back to dense"


@pytest.mark.parametrize("missing", ["file", "configuration"])
def test_one_of_both_places_is_enough(model, saved, missing):
    if missing == "file":
        (saved / "moa_plan.json").unlink()
    else:
        config = json.loads((saved / "config.json").read_text())
        del config["moa_plan"]
        (saved / "config.json").write_text(json.dumps(config))
    assert type(generate(from_pretrained(saved), return_dict_in_generate=True).past_key_values) is MoACache


def test_a_folder_without_a_plan(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"neither moa_plan\.json nor its config\.json holds a plan"):
        from_pretrained(tmp_path)
    tiny_plan(model).save(tmp_path / "p.json")
    assert from_pretrained(tmp_path, plan=str(tmp_path / "p.json")).config.moa_plan["sink"] == 4
    assert from_pretrained(str(tmp_path), plan=tiny_plan(model)).config.moa_plan["sink"] == 4


def test_two_different_plans(model, saved):
    second = tiny_plan(model, shift=1)
    second.save(saved / "moa_plan.json")
    with pytest.raises(ConfigError, match="different plans; give plan"):
        from_pretrained(saved)
    loaded = from_pretrained(saved, plan=second)
    assert Plan.model_validate(loaded.config.moa_plan) == second


def test_the_plan_is_checked_before_weights_are_read(model, saved, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **b: pytest.fail("weights are read"))
    with pytest.raises(ModelMismatchError, match="num_hidden_layers: 2 != 3"):
        from_pretrained(saved, plan=tiny_plan(tiny_model(num_hidden_layers=2)))
    with pytest.raises(ConfigError, match="anchored_at"):
        from_pretrained(saved, plan=tiny_plan(model).model_copy(update={"anchor": "prompt"}))
    (saved / "moa_plan.json").write_text("{")
    with pytest.raises(PlanFormatError, match=r"moa_plan\.json: not a JSON file"):
        from_pretrained(saved)


@pytest.mark.parametrize("options", [{}, {"attn_implementation": None}, {"attn_implementation": "sdpa"}], ids=str)
def test_a_plain_reload_is_an_error_that_says_how(saved, options):
    """`transformers serve` asks for ``attn_implementation=None``."""
    register()
    with pytest.raises(ValueError, match=r"plan: load it with moa_search\.from_pretrained, serve it with moa-serve"):
        AutoModelForCausalLM.from_pretrained(saved, **options)


def test_a_plain_reload_where_the_library_was_not_used_is_an_error(saved):
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "for options in ({}, {'attn_implementation': None}):\n"
        "    try: AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)\n"
        "    except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(saved)], check=True, capture_output=True, text=True)
    plain, with_none = done.stdout.splitlines()
    assert 'attn_implementation="moa"' in plain
    assert "serve it with moa-serve" in with_none


def test_generation_settings_come_back_as_they_were(model, tmp_path):
    model.generation_config.update(cache_implementation="static", temperature=0.5, do_sample=True)
    model.save_pretrained(tmp_path / "dense")
    with applied(model, tiny_plan(model)):
        model.save_pretrained(tmp_path / "sparse")
        model.save_pretrained(tmp_path / "sparse")
    loaded = from_pretrained(tmp_path / "sparse")
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    other = GenerationConfig(temperature=0.25, do_sample=True)
    assert from_pretrained(tmp_path / "sparse", generation_config=other).generation_config.temperature == 0.25
    remove_plan(loaded).save_pretrained(tmp_path / "sparse")
    name = "generation_config.json"
    assert (tmp_path / "sparse" / name).read_bytes() == (tmp_path / "dense" / name).read_bytes()


def test_folders_saved_by_earlier_versions_still_load(model, saved):
    file = saved / "generation_config.json"
    content = json.loads(file.read_text())
    del content["cache_implementation"]
    file.write_text(json.dumps(content))
    assert type(generate(from_pretrained(saved), return_dict_in_generate=True).past_key_values) is MoACache


def test_a_model_without_generation_settings_never_runs_dense_in_silence(model, saved):
    """It fails in the first forward pass; the error's advice works, and so does removing the plan then."""
    plan = tiny_plan(model)
    register()
    (saved / "generation_config.json").unlink()
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64)
    for run in (generate, lambda model: model(tokens(1, 5)), lambda model: model(tokens(1, 5), use_cache=False)):
        with pytest.raises(UnsupportedInputError, match=r"no plan is applied; call apply_plan\(model, plan\)"):
            run(loaded)
    with applied(model, plan):
        expected = generate(model)
    assert torch.equal(generate(apply_plan(loaded, plan)), expected)
    assert torch.equal(generate(remove_plan(loaded)), generate(model))
    assert loaded.config._attn_implementation == "sdpa"


def test_our_own_loader_gives_the_dense_model(tiny_model_dir, tmp_path):
    model, tokenizer = load_model(str(tiny_model_dir), dtype="float32")
    tokenizer.save_pretrained(tmp_path)
    with applied(model, tiny_plan(model)):
        model.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), dtype="float32")
    assert loaded.config._attn_implementation == "sdpa"
    assert not hasattr(loaded.config, "moa_plan")
    assert type(generate(loaded, return_dict_in_generate=True).past_key_values) is DynamicCache


def test_a_suspended_plan_is_saved_all_the_same(model, tmp_path):
    apply_plan(model, tiny_plan(model))
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).config._attn_implementation == "moa"


def test_a_text_decoder_inside_another_model(tmp_path):
    sizes = {**SIZES, "sliding_window": 24, "query_pre_attn_scalar": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=sizes, vision_config={**vision, "image_size": 16, "patch_size": 8}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    rules = tiny_plan(tiny_model("Gemma3", **sizes)).rules
    plan = Plan.from_rules(rules, ModelSignature.of(config), sink=4, block=8)
    with applied(model, plan):
        model.save_pretrained(tmp_path)
        expected = generate(model)
    register()
    with pytest.raises(ValueError, match="moa-serve"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert torch.equal(generate(loaded), expected)
    assert loaded.config.vision_config._attn_implementation == "sdpa"
