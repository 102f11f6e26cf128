"""Plans of other tools through the Python interface, down to a model that runs one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from moa_search import Plan, apply_plan, export_plan, import_plan, load_model
from moa_search.errors import ConfigError, ModelMismatchError
from moa_search.formats import ModelSignature

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
