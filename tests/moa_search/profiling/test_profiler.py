"""The profiler on tiny random models: what it records, what it leaves behind, what it refuses."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from moa_kernels.influence import influence_statistics
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from moa_search.data import Sample
from moa_search.errors import BackendUnavailableError, ConfigError, ProfilingError
from moa_search.formats import Profile
from moa_search.profiling import profile_samples, require_profilable

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def make_model(kind=LlamaConfig, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**{**SMALL, **changes}), dtype=torch.float32).eval()


def make_samples(length=150, count=3, answer=5):
    rng = np.random.default_rng(length)
    return [Sample(rng.integers(0, 64, length), answer, "passkey", 0.5, "random") for _ in range(count)]


def test_statistics_are_those_of_each_layers_own_tensors():
    """Hooks catch Q, K, V and the output's gradient of one layer; the profile holds their influence."""
    model, samples = make_model().double(), make_samples(count=1)
    profile = profile_samples(model, samples, sink=4, block=16, row_buckets=5)
    entry = profile.by_length[150]
    for layer in (0, 1):
        caught = catch_attention(model, layer, samples[0])
        expected = influence_statistics(
            *caught, windows=entry.header.windows, row_buckets=5, bucket_rows=30, sink=4, scale=8**-0.5
        )
        for name in ("squared", "signed"):
            recorded = torch.from_numpy(entry.per_sample[name][0, layer]).double()
            torch.testing.assert_close(recorded, expected[name], rtol=1e-5, atol=1e-12)
        for name in ("absolute", "elementwise", "recall"):
            recorded = torch.from_numpy(entry.mean[name][layer]).double()
            torch.testing.assert_close(recorded, expected[name], rtol=1e-5, atol=1e-12)


def catch_attention(model, layer, sample):
    """Q, K, V of a layer and the gradient of its attention output, from transformers' own eager attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    caught = {}

    def spy(module, query, key, value, attention_mask, **kwargs):
        out, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if module.layer_idx == layer:
            out.retain_grad()
            caught.update(qkv=(query[0].detach(), key[0].detach(), value[0].detach()), out=out)
        return out, weights

    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    before = model.config._attn_implementation
    model.set_attn_implementation("spy")
    embedded = model.get_input_embeddings()(torch.from_numpy(sample.ids)[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -sample.answer_tokens - 1 : -1]
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.answer)).backward()
    model.set_attn_implementation(before)
    return *caught["qkv"], caught["out"].grad[0].transpose(0, 1)


def test_loss_is_that_of_the_answer_alone():
    model, samples = make_model(), make_samples(count=2)
    profile = profile_samples(model, samples)
    for sample, loss in zip(samples, profile.by_length[150].loss, strict=True):
        ids = torch.from_numpy(sample.ids)
        logits = model(ids[None]).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[-6:-1], ids[-5:])
        assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_checkpointing_changes_memory_and_not_results():
    model, samples = make_model(attention_dropout=0.5), make_samples()
    plain, saved = (profile_samples(model, samples, checkpointing=flag) for flag in (False, True))
    for name in ("squared", "signed"):
        np.testing.assert_allclose(
            plain.by_length[150].per_sample[name], saved.by_length[150].per_sample[name], rtol=1e-4, atol=1e-12
        )


def test_checkpointing_really_recomputes_layers():
    model, calls = make_model(), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: calls.append(1))
    profile_samples(model, make_samples(count=1), checkpointing=False)
    assert len(calls) == 1
    profile_samples(model, make_samples(count=1), checkpointing=True)
    assert len(calls) == 3


def test_model_is_left_as_it_was():
    model = make_model()
    ids = torch.arange(40)[None]
    before, names = model(ids).logits, {name: set(vars(module)) for name, module in model.named_modules()}
    profile_samples(model, make_samples())
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)
    assert not any(module.training for module in model.modules())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_lengths_are_pooled_apart_and_the_file_round_trips(tmp_path):
    profile = profile_samples(make_model(), [*make_samples(100), *make_samples(150, 2)], model_name="tiny", seed=3)
    profile.save(tmp_path / "profile.safetensors")
    loaded = Profile.load(tmp_path / "profile.safetensors")
    assert loaded.lengths == [100, 150]
    assert [entry.samples for entry in loaded.header.lengths] == [3, 2]
    assert loaded.header.calibration["samples"] == 5
    assert (loaded.header.model_name, loaded.header.seed) == ("tiny", 3)


def test_same_samples_give_the_same_profile():
    first, second = (profile_samples(make_model(), make_samples()) for _ in range(2))
    assert first.checksum == second.checksum


def test_native_sliding_layers_are_left_out():
    model = make_model(Gemma2Config, query_pre_attn_scalar=8, sliding_window=40)
    profile = profile_samples(model, make_samples(), sink=0, block=16)
    entry = profile.by_length[150]
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert profile.header.native_layers == (0,)
    assert (entry.mean["absolute"][0] == 0).all()
    assert (entry.mean["absolute"][1][..., 0].sum(-1) > 0).all()


class TestRefusals:
    def test_loss_that_is_not_finite(self):
        model = make_model()
        model.lm_head.weight.data[:] = float("nan")
        with pytest.raises(ProfilingError, match=r"loss of sample 0 .* is nan"):
            profile_samples(model, make_samples())
        assert model.config._attn_implementation == "sdpa"

    def test_length_over_the_context(self):
        with pytest.raises(ConfigError, match=r"600 is over the model's context of 512"):
            profile_samples(make_model(), make_samples(600))

    def test_no_samples(self):
        with pytest.raises(ConfigError, match="no calibration samples"):
            profile_samples(make_model(), [])


def test_triton_is_refused_before_any_work_where_it_cannot_run(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = make_model()
    with pytest.raises(BackendUnavailableError, match="need a CUDA device, not 'cpu'"):
        profile_samples(model, make_samples(count=1), impl="triton", partial=tmp_path / "partial")
    assert not (tmp_path / "partial").exists()
    with pytest.raises(BackendUnavailableError, match="need a CUDA device, not 'cpu'"):
        require_profilable(model, impl="triton")  # what profile_model asks before it calibrates


@pytest.mark.slow
def test_kernels_and_torch_make_the_same_profile():
    """In a process of its own: Triton's interpreter is chosen when its kernels are first imported.

    Without 8 bits, which change the outputs of this model by little more than float32 rounds.
    """
    pytest.importorskip("triton")
    script = (
        "import numpy as np\n"
        "from tests.moa_search.profiling.test_profiler import make_model, make_samples\n"
        "from moa_search.profiling import profile_samples\n"
        "settings = {'sink': 4, 'block': 16, 'row_buckets': 4, 'tiers': (4, 2)}\n"
        "found = [\n"
        "    profile_samples(make_model(), make_samples(70, count=1), impl=impl, **settings)\n"
        "    for impl in ('triton', 'torch')\n"
        "]\n"
        "spans, codes = ([each.by_length[70] for each in those] for those in (found, [each.tiers for each in found]))\n"
        "kinds = [[getattr(entry, kind) for entry in spans] for kind in ('per_sample', 'mean')]\n"
        "kinds += [[getattr(entry, side)[bits] for entry in codes] for side in ('keys', 'values') for bits in (4, 2)]\n"
        "for mine, reference in kinds:\n"
        "    for name in reference:\n"
        "        scale = np.abs(reference[name]).max()\n"
        "        assert scale > 0\n"
        "        assert np.abs(mine[name].astype(float) - reference[name]).max() <= 2e-3 * scale, name\n"
        "print('equal')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
