"""Caches written to files: they go on as if they had never been away, and nothing else is taken for one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moa_search.errors import (
    CacheFormatError,
    CacheVersionError,
    ConfigError,
    MoAError,
    ModelMismatchError,
    UnsupportedInputError,
)
from moa_search.runtime import MoACache, applied, apply_plan

from .explicit import tiny_model, tiny_plan, tokens
from .test_coded import mixed_plan

MORE = 50


@torch.no_grad()
def filled(model, ids, mask=None):
    cache = MoACache(model.config, model._moa_applied.plan)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache


@torch.no_grad()
def going_on(model, cache, mask=None):
    """Logits of `MORE` greedy tokens, one by one; the cache is used up."""
    token, found = torch.full((len(cache.layers[0].lens), 1), 5), []
    for _ in range(MORE):
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        position = cache.layers[0].lens[:, None]
        out = model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits
        found.append(out)
        token = out[:, -1:].argmax(-1)
    return torch.cat(found, 1)


def padded(*lens):
    mask = torch.zeros(len(lens), max(lens), dtype=torch.int64)
    for sample, length in enumerate(lens):
        mask[sample, max(lens) - length :] = 1
    return mask


def cropped(model):
    cache = filled(model, tokens(1, 90))
    cache.activate_past_recording(20)
    with torch.no_grad():
        model(tokens(1, 40, seed=2), past_key_values=cache)
    cache.crop(-15)
    return cache, None


CACHES = {
    "a document": lambda model: (filled(model, tokens(1, 200)), None),
    "fewer tokens than the sink": lambda model: (filled(model, tokens(1, 2)), None),
    "a padded batch": lambda model: (filled(model, tokens(3, 60), padded(60, 11, 35)), padded(60, 11, 35)),
    "rolled back, with room to": cropped,
}


@pytest.mark.parametrize("kind", CACHES)
def test_the_next_tokens_are_equal_to_the_bit(kind, model, plan, tmp_path):
    cache, mask = CACHES[kind](model)
    cache.save(tmp_path / "cache.safetensors")
    back = MoACache.load(tmp_path / "cache.safetensors", plan)
    back.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "cache.safetensors").read_bytes()
    assert (back.nbytes, back.get_seq_length()) == (cache.nbytes, cache.get_seq_length())
    back_again, first = back.copy(), going_on(model, back, mask)
    assert torch.equal(first, going_on(model, cache, mask))
    assert torch.equal(first, going_on(model, back_again, mask))


def test_generate_answers_from_a_file_what_it_answers_from_memory(model, plan, tmp_path):
    document, question = tokens(1, 150), tokens(1, 20, seed=3)
    cache = filled(model, document)
    cache.save(tmp_path / "document.safetensors", model=model)
    ids = torch.cat([document, question], 1)
    options = {"max_new_tokens": MORE, "do_sample": False}
    whole = model.generate(ids, **options)
    for _ in range(2):
        kept = MoACache.load(tmp_path / "document.safetensors", plan, model=model)
        assert torch.equal(model.generate(ids, past_key_values=kept, **options), whole)


def test_codes_are_equal_to_the_bit_too(tmp_path):
    model = tiny_model()
    plan = mixed_plan(model)
    apply_plan(model, plan)
    cache = filled(model, tokens(2, 90))
    cache.save(tmp_path / "cache.safetensors", model=model)
    back = MoACache.load(tmp_path / "cache.safetensors", plan, model=model)
    assert back.nbytes == cache.nbytes < filled(apply_plan(tiny_model(), tiny_plan(model)), tokens(2, 90)).nbytes
    assert torch.equal(going_on(model, back), going_on(model, cache))


def test_bfloat16_stays_bfloat16(plan, tmp_path):
    model = apply_plan(tiny_model(dtype=torch.bfloat16), plan)
    cache = filled(model, tokens(2, 80))
    cache.save(tmp_path / "cache.safetensors", model=model)
    back = MoACache.load(tmp_path / "cache.safetensors", plan, model=model)
    assert back.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(going_on(model, back), going_on(model, cache))


def test_native_windows_and_rollbacks_live_on(tmp_path):
    model = tiny_model("Gemma2", sliding_window=16)
    plan = tiny_plan(model)
    apply_plan(model, plan)
    cache = filled(model, tokens(1, 60))
    cache.activate_past_recording()
    cache.save(tmp_path / "cache.safetensors")
    back = MoACache.load(tmp_path / "cache.safetensors", plan)
    for each in (cache, back):
        with torch.no_grad():
            model(tokens(1, 9, seed=1), past_key_values=each)
        each.crop(-9)
    assert torch.equal(going_on(model, back), going_on(model, cache))


def test_the_file_is_as_large_as_the_cache_and_holds_no_foreign_memory(model, tmp_path):
    for value in (1.5, 2.5):  # what the allocator hands out next
        _ = [torch.full((1, length, 16), value, dtype=torch.float64) for length in range(1, 400)]
        cache = filled(model, tokens(1, 70))
        cache.save(tmp_path / f"{value}.safetensors")
        assert (tmp_path / f"{value}.safetensors").stat().st_size < cache.nbytes + 4096
    assert (tmp_path / "1.5.safetensors").read_bytes() == (tmp_path / "2.5.safetensors").read_bytes()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("caches") / "cache.safetensors"
    filled(model, tokens(2, 60)).save(path, model=model)
    return path


class TestWrongInput:
    def test_other_weights_and_weights_unknown(self, file, model, plan, tmp_path):
        other = tiny_model(initializer_range=0.2)
        with pytest.raises(ModelMismatchError, match="filled by other weights"):
            MoACache.load(file, plan, model=other)
        filled(model, tokens(1, 9)).save(tmp_path / "unknown.safetensors")
        MoACache.load(tmp_path / "unknown.safetensors", plan)
        with pytest.raises(ConfigError, match="doesn't say whose weights filled it"):
            MoACache.load(tmp_path / "unknown.safetensors", plan, model=model)

    def test_another_plan(self, file, model):
        with pytest.raises(ModelMismatchError, match=r"filled under another plan \(sha256:[0-9a-f]{8}\) than this one"):
            MoACache.load(file, tiny_plan(model, shift=1))

    def test_a_cache_of_another_plan_that_generate_made(self, model, plan, tmp_path):
        with applied(model, tiny_plan(model, shift=1)):
            options = {"max_new_tokens": 2, "return_dict_in_generate": True}
            model.generate(tokens(1, 30), **options).past_key_values.save(tmp_path / "other.safetensors")
        with pytest.raises(ModelMismatchError, match="another plan"):
            MoACache.load(tmp_path / "other.safetensors", plan)

    @pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.999])
    def test_a_truncated_file(self, part, file, plan, tmp_path):
        raw = file.read_bytes()
        (tmp_path / "cut").write_bytes(raw[: int(len(raw) * part)])
        with pytest.raises(CacheFormatError, match="not a safetensors file, or a truncated one"):
            MoACache.load(tmp_path / "cut", plan)

    @pytest.mark.parametrize(
        ("change", "error", "told"),
        [
            (lambda tensors, header: header.update(schema="moa-cache/9"), CacheVersionError, "upgrade it"),
            (lambda tensors, header: header.update(more=1), CacheFormatError, "more: unknown key"),
            (lambda tensors, header: header["layers"].pop(), CacheFormatError, "damaged: 2 layers"),
            (lambda tensors, header: header["layers"][1].update(seen="60"), CacheFormatError, "layers.1.seen"),
            (lambda tensors, header: header["layers"][1].update(reserved=-1), CacheFormatError, "layers.1.reserved"),
            (lambda tensors, header: header["layers"][1].update(reserved=9), CacheFormatError, "with room for 9"),
            (lambda tensors, header: header["layers"][1].update(unpadded=61), CacheFormatError, "can't be"),
            (lambda tensors, header: tensors.pop("layer.2.floor"), CacheFormatError, "layer 2 has no tensor 'floor'"),
            (lambda tensors, header: tensors.pop("layer.0.keys"), CacheFormatError, "layer 0 has no tensor 'keys'"),
            (
                lambda tensors, header: tensors.update({"layer.0.keys": tensors["layer.0.keys"][:1]}),
                CacheFormatError,
                "damaged: layer 0: keys holds",
            ),
            (
                lambda tensors, header: tensors.update({"layer.0.values": tensors["layer.0.values"].float()}),
                CacheFormatError,
                "damaged: layer 0: values holds torch.float32",
            ),
            (
                lambda tensors, header: tensors.update({"layer.1.lens": torch.tensor([60, 70])}),
                CacheFormatError,
                "lens from 60 to 70 of 60 tokens",
            ),
        ],
    )
    def test_a_file_changed_by_hand(self, change, error, told, file, plan, tmp_path):
        tensors, (header,) = load_file(file), read_header(file)
        change(tensors, header)
        save_file(tensors, tmp_path / "changed", metadata={"moa_cache": json.dumps(header)})
        with pytest.raises(error, match=told) as caught:
            MoACache.load(tmp_path / "changed", plan)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"moa_cache": "{"}, {"moa_cache": "[]"}])
    def test_other_safetensors(self, metadata, plan, tmp_path):
        save_file({"weight": torch.zeros(2)}, tmp_path / "weights", metadata=metadata)
        with pytest.raises(CacheFormatError, match=r"not a cache of moa-search|damaged"):
            MoACache.load(tmp_path / "weights", plan)

    def test_paths_and_devices(self, file, plan, model, tmp_path):
        with pytest.raises(ConfigError, match="no such file"):
            MoACache.load(tmp_path / "nothing", plan)
        with pytest.raises(ConfigError, match="not a file"):
            MoACache.load(tmp_path, plan)
        with pytest.raises(ConfigError, match="device 'cuda:7' isn't there"):
            MoACache.load(file, plan, device="cuda:7")
        with pytest.raises(ConfigError, match="can't be written"):
            filled(model, tokens(1, 3)).save(tmp_path)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("use", [lambda cache, _: cache.save("never"), lambda cache, _: cache.take(0)])
    @pytest.mark.parametrize("kind", ["empty", "fixed", "hybrid", "half"])
    def test_caches_that_have_no_such_state(self, use, kind, model, plan, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UnsupportedInputError) as caught:
            use(unfit(kind, model, plan), None)
        assert "can't be" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert list(Path().iterdir()) == []


def unfit(kind, model, plan):
    if kind == "empty":
        return MoACache(model.config, plan)
    if kind == "fixed":
        cache = MoACache(model.config, plan, max_length=64)
        with torch.no_grad():
            model(tokens(1, 9), past_key_values=cache)
        return cache
    if kind == "hybrid":
        other = tiny_model(
            "FalconH1", mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1
        )
        return MoACache(other.config, tiny_plan(other))
    cache = filled(model, tokens(1, 9))
    last = model.model.layers[2].self_attn
    hook = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        with torch.no_grad():
            model(tokens(1, 3), past_key_values=cache)
    except KeyboardInterrupt:
        hook.remove()
    return cache


def read_header(path):
    raw = Path(path).read_bytes()
    outer = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return [json.loads(outer["__metadata__"]["moa_cache"])]


def test_every_error_is_one_of_ours():
    assert issubclass(CacheFormatError, MoAError)
    assert issubclass(CacheVersionError, CacheFormatError)
