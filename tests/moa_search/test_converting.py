"""Plans of other tools through the Python interface, down to a model that runs one."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, MistralConfig, MistralForCausalLM

from moa_search import Plan, Profile, apply_plan, export_plan, import_plan, load_model, search_plan
from moa_search.errors import ConfigError, ModelMismatchError
from moa_search.formats import ModelSignature
from moa_search.search.comparing import predicted_losses

GOLDEN = Path(__file__).parents[1] / "golden"
MOA = str(GOLDEN / "moa-alphas-betas.json")
DUO = str(GOLDEN / "duo-attention")


def test_a_model_can_be_named_in_many_ways(tiny_model_dir, tiny_profile, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    wanted = import_plan(MOA, model=str(tiny_model_dir))
    assert wanted.model == ModelSignature.of(config)
    for model in (config, wanted.model, wanted, tiny_model_dir):
        assert import_plan(MOA, model=model) == wanted
    wanted.save(tmp_path / "plan.json")
    assert import_plan(MOA, model=str(tmp_path / "plan.json")) == wanted
    tiny_profile.save(tmp_path / "profile.safetensors")
    with pytest.raises(ModelMismatchError, match="it has 2 layers, the model 3"):
        import_plan(MOA, model=str(tmp_path / "profile.safetensors"))
    numbers = import_plan(MOA, model="layers=2,heads=4,kv_heads=2,head_dim=8")
    assert numbers.patterns == wanted.patterns
    with pytest.raises(ModelMismatchError, match="architecture: unknown != llama"):
        numbers.model.require(wanted.model, "plan")


@pytest.mark.parametrize(
    "numbers",
    ["layers=2", "layers=2,heads=4,kv_heads=2,head_dim=0", "layers=2,heads=4,kv_heads=3,head_dim=8", "layers=-2,x=1"],
)
def test_numbers_that_are_no_model(numbers):
    with pytest.raises(ConfigError, match="model: "):
        import_plan(MOA, model=numbers)


def test_a_plan_of_ours_is_only_checked(tiny_plan, tiny_model_dir, tmp_path):
    tiny_plan.save(tmp_path / "plan.json")
    assert import_plan(str(tmp_path / "plan.json")) == import_plan(tiny_plan) == tiny_plan
    assert import_plan(tiny_plan, model=tiny_plan) is tiny_plan
    with pytest.raises(ModelMismatchError, match="num_hidden_layers: 3 != 2"):
        import_plan(tiny_plan, model=str(tiny_model_dir))
    with pytest.raises(ConfigError, match="sparsity: it is for plans of other tools"):
        import_plan(tiny_plan, sparsity=0.5)


@pytest.mark.parametrize("length", [0, 10**12])
def test_lengths_out_of_range(length):
    with pytest.raises(ConfigError, match=r"fold_lengths: .* is out of range"):
        import_plan(MOA, model="layers=2,heads=4,kv_heads=2,head_dim=8", fold_lengths=[4096, length])


@pytest.mark.parametrize("format", ["plan", "moa", "duo"])
def test_export(tiny_model_dir, tmp_path, format):
    plan = import_plan(DUO if format == "duo" else MOA, model=str(tiny_model_dir))
    target = tmp_path / "made" / "out"
    assert export_plan(plan, str(target), format=format) is plan
    assert import_plan(str(target), model=plan).patterns == plan.patterns


def test_export_refuses_before_it_writes(tiny_plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        export_plan(tiny_plan, str(tmp_path), format="moa")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        export_plan(tiny_plan, str(tmp_path / "file"), format="duo")
    with pytest.raises(ConfigError, match="sink is 4 tokens"):
        export_plan(tiny_plan, str(tmp_path / "new"), format="moa")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_imported_plans_run(tiny_model_dir):
    """DuoAttention's at once, MoA's once its length is fixed."""
    model, _ = load_model(str(tiny_model_dir), dtype="float32")
    prompt = torch.arange(2, 202)[None]

    def generate():
        return model.generate(prompt, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)

    kept = {}
    for name, plan in {
        "duo": import_plan(DUO, model=model, sink=4, recent=28),
        "moa": import_plan(MOA, model=model).anchored_at(220),
        "dense": Plan.uniform(import_plan(DUO, model=model).rules[0][0], ModelSignature.of(model.config)),
    }.items():
        apply_plan(model, plan)
        kept[name] = generate().past_key_values.nbytes
    assert kept["duo"] < kept["moa"] < kept["dense"]
    with pytest.raises(ConfigError, match="anchored_at"):
        apply_plan(model, import_plan(MOA, model=model))


PROFILE = str(GOLDEN / "moa-profile-2.safetensors")


@pytest.fixture
def coded_plan():
    """Short spans in few bits, from the profile that measured the transforms."""
    return search_plan(PROFILE, kv_share=0.62)


def test_a_precision_per_layer_is_priced_by_a_profile_and_comes_back_through_it(tmp_path, coded_plan):
    kept = export_plan(coded_plan, str(tmp_path / "out"), format="kvtuner", profile=PROFILE)
    first, last = kept.provenance.notes[0], kept.provenance.notes[-1]
    assert first.endswith("the least that is enough for every KV head")
    losses = re.fullmatch(r"predicted loss, signed, of other tokens than the first ones: (\S+) -> (\S+) at .*", last)
    before, after = map(float, losses.groups())
    profile = Profile.load(PROFILE)
    length = profile.lengths[0]
    assert before == pytest.approx(next(m.loss for m in coded_plan.predicted if m.length == length), rel=1e-3)
    assert after == pytest.approx(predicted_losses(profile, kept, "signed")[length][0], rel=1e-3)
    assert import_plan(str(tmp_path / "out"), model=PROFILE).tiers == kept.tiers
    assert import_plan(str(tmp_path / "out"), model=coded_plan).key_transforms == coded_plan.key_transforms
    with pytest.raises(ConfigError, match="profile: it predicts what modelopt or kvtuner change, not onnx"):
        export_plan(coded_plan, str(tmp_path / "new"), format="onnx", profile=PROFILE)


def test_bits_that_a_profile_does_not_know_are_not_priced(tmp_path, coded_plan):
    kept = export_plan(coded_plan, str(tmp_path / "out"), format="modelopt", profile=PROFILE)
    assert kept.provenance.notes[-1] == "no predicted loss: the profile knows nothing of 4 bits (moa-profile --tiers)"


def test_plans_of_others_get_a_precision(tiny_model_dir, tmp_path):
    plan = import_plan(DUO, model=str(tiny_model_dir), sink=4, recent=28, bits=8)
    assert plan.tiers == [[(8, 8)] * 2] * 2
    model, _ = load_model(str(tiny_model_dir), dtype="float32")
    apply_plan(model, plan)
    made = model.generate(torch.arange(2, 66)[None], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    apply_plan(model, import_plan(DUO, model=model, sink=4, recent=28))
    whole = model.generate(torch.arange(2, 66)[None], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert made.past_key_values.nbytes < 0.6 * whole.past_key_values.nbytes
    for bits, message in (([4, 8], "keys in 4 bits need transforms"), ([5], "bits: 5 can't be stored")):
        with pytest.raises(ConfigError, match=message):
            import_plan(MOA, model=str(tiny_model_dir), bits=bits)
    for bits in ([8, 8, 8], "eight", 8.5):
        with pytest.raises(ConfigError, match="bits: "):
            import_plan(MOA, model=str(tiny_model_dir), bits=bits)
    with pytest.raises(ConfigError, match="bits: it is for plans of other tools"):
        import_plan(plan, bits=8)


def test_what_an_engine_attends_runs_here(tiny_model_dir, tmp_path):
    """A plan cut down to windows gives the tokens of a model whose own sliding window is as long."""
    model, _ = load_model(str(tiny_model_dir), dtype="float32")
    windows = tmp_path / "windows.json"
    windows.write_text('{"GroupQueryAttention": {"local_window_size": [24]}}')
    config = MistralConfig(**{**model.config.to_dict(), "sliding_window": 24})
    apply_plan(model, import_plan(str(windows), model=model))
    prompt = torch.arange(2, 102)[None]
    mistral = MistralForCausalLM(config).eval()
    mistral.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(prompt).logits, mistral(prompt).logits, atol=1e-5, rtol=1e-5)
