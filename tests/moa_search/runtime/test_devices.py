"""Models whose weights are somewhere else, as `device_map` puts them."""

from __future__ import annotations

import pytest
import torch

from moa_search.runtime import MoACache, apply_plan, from_pretrained

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def model():
    return tiny_model()


def generate(model, **options):
    prompt, real = tokens(2, 60), torch.ones(2, 60, dtype=torch.int64)
    real[0, :25] = 0
    return model.generate(prompt, attention_mask=real, max_new_tokens=30, do_sample=False, **options)


def assert_exact(reference, found):
    for sample, first in ((0, 25), (1, 0)):
        sequence = found[sample : sample + 1, first:]
        expected = logits(reference, sequence)[:, 59 - first : -1].argmax(-1)
        assert torch.equal(sequence[:, 60 - first :], expected)


@pytest.mark.parametrize("before", [False, True])
def test_weights_that_come_from_main_memory_when_they_are_needed(model, before):
    """Whether the plan is applied first or accelerate's hooks are."""
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    if before:
        apply_plan(model, plan)
    accelerate.cpu_offload(model, execution_device="cpu")
    if not before:
        apply_plan(model, plan)
    assert model.model.layers[0].self_attn.k_proj.weight.device.type == "meta"
    result = generate(model, return_dict_in_generate=True)
    assert type(result.past_key_values) is MoACache
    assert_exact(reference, result.sequences)


def test_weights_on_disk_by_device_map(model, tmp_path):
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    apply_plan(model, plan)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    loaded = from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    loaded.generation_config.eos_token_id = None
    assert loaded.model.layers[1].self_attn.k_proj.weight.device.type == "meta"
    assert_exact(reference, generate(loaded))


def test_every_layer_keeps_its_keys_where_its_states_come_from(model):
    """Devices on a machine that has one: "meta" stands for a second."""
    cache = MoACache(model.config, tiny_plan(model))
    for layer, device in zip(cache.layers, ("cpu", "meta", "cpu"), strict=True):
        states = torch.zeros(1, 2, 20, 16, device=device)
        layer.lazy_initialization(states, states)
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta", "cpu"]
    assert [layer.lens.device.type for layer in cache.layers] == ["cpu", "meta", "cpu"]
