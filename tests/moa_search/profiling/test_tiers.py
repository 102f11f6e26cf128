"""Profiling with tiers: changes of each layer's own tensors, transforms before rotary embedding, resuming, refusals."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from moa_kernels.coded_influence import coded_changes
from moa_kernels.codes import Codec, Moments, Transform
from safetensors.numpy import load_file, save_file
from transformers import Gemma2Config, GlmConfig, Qwen3Config, StableLmConfig

from moa_search.data import Sample
from moa_search.errors import ConfigError, ModelMismatchError, ProfilingError
from moa_search.formats import Profile
from moa_search.formats.merge import merge
from moa_search.profiling import profile_samples
from moa_search.profiling import profiler as module
from tests.moa_search.architectures import ARCHITECTURES
from tests.moa_search.architectures import make_model as make_architecture

from .test_architectures import mixed_loss
from .test_profiler import catch_attention, make_model, make_samples

SETTINGS = {"sink": 4, "block": 16, "row_buckets": 5}


def test_changes_are_those_of_each_layers_own_tensors():
    """Hooks catch Q, K, V and the output's gradient of one layer; the profile holds what codes of them cost."""
    model, samples = make_model().double(), make_samples(count=1)
    profile = profile_samples(model, samples, tiers=[16, 2, 4], **SETTINGS)
    entry = profile.tiers.by_length[150]
    assert profile.header.tiers.bits == (4, 2)
    for layer in (0, 1):
        query, key, value, grad = catch_attention(model, layer, samples[0])
        transforms = [
            {bits: key_transform(profile.tiers.transforms, layer, bits) for bits in (4, 2)},
            dict.fromkeys((4, 2), Transform.rotation(2, 8)),
        ]
        seen = [
            torch.stack([x, *(Codec(bits, of_bits[bits]).seen(x, torch.arange(150), 4) for bits in (4, 2))])
            for x, of_bits in zip((key, value), transforms, strict=True)
        ]
        rows = -(-150 // entry.header.row_buckets)
        sizes = {"windows": entry.header.windows, "row_buckets": entry.header.row_buckets, "bucket_rows": rows}
        expected = coded_changes(query, *seen, grad, **sizes, sink=4, scale=8**-0.5, impl="torch")
        for name, changes in expected.items():
            found = [side[bits][name][0, layer] for side in (entry.keys, entry.values) for bits in (4, 2)]
            for recorded, wanted in zip(found, changes.unbind(-1), strict=True):
                torch.testing.assert_close(torch.from_numpy(recorded).double(), wanted, rtol=1e-4, atol=1e-10)


def test_spans_alone_are_measured_the_same():
    plain, tiered = (profile_samples(make_model(), make_samples(), tiers=tiers) for tiers in ((), (8, 4, 2)))
    assert plain.by_length[150] == tiered.by_length[150]
    assert plain.tiers is None
    assert profile_samples(make_model(), make_samples(), tiers=[16]).checksum == plain.checksum


def test_fewer_bits_cost_more():
    profile = profile_samples(make_model(), make_samples(count=4), tiers=(8, 4, 3, 2))
    entry = profile.tiers.by_length[150]
    for side in (entry.keys, entry.values):
        costs = [side[bits]["squared"][..., -1].sum() for bits in (8, 4, 3, 2)]
        assert costs == sorted(costs)
        assert costs[0] > 0


def key_transform(transforms, layer, bits=2):
    statics = {name: torch.from_numpy(array) for name, array in transforms.layer(layer).items()}
    return Transform.of_keys(**statics, bits=bits)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kind": Qwen3Config},
        {"kind": GlmConfig, "partial_rotary_factor": 0.5, "pad_token_id": 0},
        {"kind": StableLmConfig, "partial_rotary_factor": 0.5},
    ],
)
def test_transforms_are_those_of_keys_before_rotary_embedding(config):
    """Statistics don't depend on positions: with the tokens somewhere else in the context, they are the same."""
    model, samples = make_model(**config), make_samples(count=2)
    known = profile_samples(model, samples, tiers=[2], **SETTINGS).tiers.transforms
    assert known.frequencies.any(axis=-1).all()
    caught = {}

    def spy(layer, query, key, value):
        at, rotary = torch.arange(300, 450), key_transform(known, layer).rotary
        before = (rotary.turn(x[0], at, back=True)[:, 4:] for x in (query, key))
        moments = Moments.of(*before, value[0, :, 4:])
        caught[layer] = caught[layer] + moments if layer in caught else moments

    with Spied(model, spy), torch.no_grad():
        for sample in samples:
            model(torch.from_numpy(sample.ids)[None], position_ids=torch.arange(300, 450)[None], use_cache=False)
    for layer, moments in caught.items():
        balance, mean, spectrum = moments.key_statics()
        np.testing.assert_allclose(known.mean[layer], mean, rtol=2e-3, atol=1e-4)
        found = torch.from_numpy(known.balance[layer])
        signs = (found * balance).sum(1, keepdim=True).sign()  # columns are eigenvectors
        torch.testing.assert_close(found * signs, balance, rtol=5e-2, atol=5e-3)
        np.testing.assert_allclose(known.spectrum[layer], spectrum, rtol=1e-2)
        assert (np.diff(known.spectrum[layer]) <= 0).all()


def test_a_context_without_room_to_move_samples_still_has_transforms():
    known = profile_samples(make_model(max_position_embeddings=150), make_samples(), tiers=[4]).tiers.transforms
    assert not known.frequencies.any()
    assert known.mean.any()


def test_a_model_without_positions_still_has_transforms():
    model = make_model()
    model.config.rope_parameters = None
    known = profile_samples(model, make_samples(), tiers=[4]).tiers.transforms
    assert not known.frequencies.any()
    assert known.mean.any()


class Spied:
    """Sees every layer's tensors during a forward pass."""

    def __init__(self, model, spy):
        self.model, self.spy = model, spy

    def __enter__(self):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def attention(module, query, key, value, attention_mask, **kwargs):
            self.spy(module.layer_idx, query, key, value)
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register("spy", attention)
        self.before = self.model.config._attn_implementation
        self.model.set_attn_implementation("spy")

    def __exit__(self, *args):
        self.model.set_attn_implementation(self.before)


def test_native_layers_are_left_out(tmp_path):
    model = make_model(Gemma2Config, query_pre_attn_scalar=8, sliding_window=40)
    profile = profile_samples(model, make_samples(), sink=0, block=16, tiers=[4])
    keys = profile.tiers.by_length[150].keys[4]["squared"]
    assert not keys[:, 0].any()
    assert keys[:, 1].all(axis=-1).any()
    assert np.array_equal(profile.tiers.transforms.balance[0, 0], np.eye(8))
    profile.save(tmp_path / "native.safetensors")
    assert Profile.load(tmp_path / "native.safetensors").header.tiers == profile.header.tiers


def test_a_run_that_goes_on_keeps_its_transforms(tmp_path, monkeypatch):
    expected = profile_samples(make_model(), make_samples(), tiers=[4, 2])
    measure, calls = module.SampleMeter.measure, []

    def stop_at_two(self, modules, sample, number):
        if number == 2:
            raise KeyboardInterrupt
        return measure(self, modules, sample, number)

    monkeypatch.setattr(module.SampleMeter, "measure", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        profile_samples(make_model(), make_samples(), tiers=[4, 2], partial=tmp_path / "partial")
    monkeypatch.setattr(module.SampleMeter, "measure", measure)
    monkeypatch.setattr(module, "measure_transforms", lambda *args, **kwargs: calls.append(1))
    with pytest.raises(ConfigError, match=r"tiers.bits was \[4, 2\], is \[4\]"):
        profile_samples(make_model(), make_samples(), tiers=[4], partial=tmp_path / "partial")
    found = profile_samples(make_model(), make_samples(), tiers=[4, 2], partial=tmp_path / "partial")
    assert found.checksum == expected.checksum
    assert not calls


def change_kept(folder, change):
    """Transforms that a stopped run left behind, changed."""
    path = folder / "transforms.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_run_from_before_goes_on_without_a_spectrum(tmp_path, monkeypatch):
    stopped_at_once(tmp_path, monkeypatch)
    change_kept(tmp_path, lambda tensors: tensors.pop("spectrum"))
    found = profile_samples(make_model(), make_samples(), tiers=[4, 2], partial=tmp_path)
    assert found.tiers.transforms.spectrum is None
    again = profile_samples(make_model(), make_samples(), tiers=[4, 2], transforms=found)
    for name, values in found.tiers.arrays().items():
        np.testing.assert_array_equal(again.tiers.arrays()[name], values)


def test_damaged_transforms_of_a_stopped_run_are_one_line(tmp_path, monkeypatch):
    stopped_at_once(tmp_path, monkeypatch)
    change_kept(tmp_path, lambda tensors: tensors["spectrum"].fill(0))
    with pytest.raises(
        ProfilingError, match=r"spectrum isn't positive and decreasing at layer 0, .*--resume false"
    ) as error:
        profile_samples(make_model(), make_samples(), tiers=[4, 2], partial=tmp_path)
    assert "\n" not in str(error.value)


def stopped_at_once(folder, monkeypatch):
    """A run that ends before its first sample."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.SampleMeter, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            profile_samples(make_model(), make_samples(), tiers=[4, 2], partial=folder)


def test_profiles_under_the_same_transforms_merge():
    one = profile_samples(make_model(), make_samples(), tiers=[4])
    samples = make_samples(149)  # drawn from another seed
    for sample in samples:
        object.__setattr__(sample, "target_length", 150)
    with pytest.raises(ConfigError, match="other transforms"):
        merge([one, profile_samples(make_model(), samples, tiers=[4])])
    two = profile_samples(make_model(), samples, tiers=[4], transforms=one)
    assert merge([one, two]).tiers.by_length[150].keys[4]["signed"].shape[0] == 6


def test_a_pruned_head_is_profiled_like_any_other():
    model = make_model()
    attention = model.model.layers[1].self_attn
    attention.k_proj.weight.data[: attention.head_dim] = 0
    model.model.layers[0].self_attn.q_proj.weight.data[:] = 0
    found = profile_samples(model, make_samples(), tiers=[4, 2])
    assert np.isfinite(found.tiers.transforms.balance).all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"tiers": [5]}, "tiers are 5; choose from 16, 8, 4, 3, 2"),
        ],
    )
    def test_options_that_cannot_be(self, options, says):
        with pytest.raises(ConfigError, match=says):
            profile_samples(make_model(), make_samples(), **options)

    def test_heads_that_do_not_pack(self):
        with pytest.raises(
            ConfigError,
            match=r"tier 3: vectors of 12 numbers don't pack .* leave it out of --tiers, this width takes 16, 8, 4, 2$",
        ):
            profile_samples(make_model(head_dim=12), make_samples(), tiers=[8, 3])

    def test_transforms_of_another_profile(self):
        plain = profile_samples(make_model(), make_samples())
        with pytest.raises(ConfigError, match="the profile given for --transforms has none; profile it with --tiers"):
            profile_samples(make_model(), make_samples(), tiers=[4], transforms=plain)
        coded = profile_samples(make_model(), make_samples(), tiers=[4])
        with pytest.raises(ConfigError, match="name some with --tiers, such as 16 8 4 2"):
            profile_samples(make_model(), make_samples(), tiers=[16], transforms=coded)
        wider = profile_samples(make_model(head_dim=16), make_samples(), tiers=[4])
        with pytest.raises(ModelMismatchError, match="the profile given for --transforms"):
            profile_samples(make_model(), make_samples(), tiers=[4], transforms=wider)

    def test_keys_that_are_not_finite(self):
        model = make_model()
        model.model.layers[1].self_attn.k_proj.weight.data[:] = float("nan")
        with pytest.raises(ProfilingError, match="layer 1: keys have no transform"):
            profile_samples(model, make_samples(), tiers=[4])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_changes_are_derivatives_of_the_loss(architecture):
    """As in test_architectures: the rate at which mixing in a head's coded output under a window changes the loss."""
    model = make_architecture(architecture)
    sample = Sample(np.random.default_rng(0).integers(3, 64, 120), 4, "passkey", 0.5, "random")
    profile = profile_samples(model, [sample], sink=3, block=16, row_buckets=4, tiers=[8, 2])
    entry, plain, native = profile.tiers.by_length[120], profile.by_length[120], profile.header.native_layers
    shape = (profile.header.model.num_hidden_layers, profile.header.model.num_key_value_heads)
    for pair in ((8, 16), (2, 16), (16, 8), (16, 2)):
        mix = torch.zeros(*shape, len(entry.header.windows), dtype=torch.float64, requires_grad=True)
        mixed_loss(model, sample, entry.header.windows, mix, partial(seen, profile, pair)).backward()
        mix.grad[list(native)] = 0
        at = [plain.header.windows.index(window) for window in entry.header.windows]
        signed = plain.per_sample["signed"][0].sum(-2)[..., at] + entry.change("signed", *pair)[0].sum(-2)
        torch.testing.assert_close(
            torch.from_numpy(signed).double(), mix.grad, rtol=1e-3, atol=1e-4 * mix.grad.abs().max().item()
        )


def seen(profile, bits, layer, key, value):
    """Keys and values as attention sees them under a pair of codecs, ``[1, kv_heads, N, head_dim]``."""
    keys, values = bits
    of_keys = key_transform(profile.tiers.transforms, layer, keys) if keys < 8 else None
    of_values = Transform.rotation(value.shape[1], value.shape[-1]) if values < 8 else None
    at, sink = torch.arange(key.shape[2]), profile.header.sink
    return Codec(keys, of_keys).seen(key, at, sink), Codec(values, of_values).seen(value, at, sink)
