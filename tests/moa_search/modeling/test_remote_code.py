"""Models that bring code along run it when they are trusted, and are refused at once otherwise."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from moa_search import load_model
from moa_search.errors import ConfigError
from moa_search.modeling.loading import load_config, random_model

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pathlib.Path({trace!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def bring_code(folder, trace, *, model=True, tokenizer=False):
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    if model:
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        }
        (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def folder(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asks"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


LOADERS = {"model": load_model, "configuration": load_config, "random weights": random_model}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_is_not_run_unasked(folder, tmp_path, loader):
    with pytest.raises(ConfigError, match=r"runs code of its own; .*--trust-remote-code true") as caught:
        LOADERS[loader](bring_code(folder, tmp_path / "ran"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizers_code_is_not_run_unasked(folder, tmp_path):
    spec = bring_code(folder, tmp_path / "ran", model=False, tokenizer=True)
    with pytest.raises(ConfigError, match="runs code of its own"):
        load_model(spec, dtype="float32")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_model_runs_its_code(folder, tmp_path, tiny_model_dir):
    spec = bring_code(folder, tmp_path / "ran", tokenizer=True)
    model, tokenizer = load_model(spec, dtype="float32", trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert type(model).__name__ == "OwnForCausalLM"
    assert type(tokenizer).__name__ == "OwnTokenizer"
    ids = torch.arange(5, 25)[None]
    plain, _ = load_model(str(tiny_model_dir), dtype="float32")
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert random_model(spec, dtype="float32", trust_remote_code=True).config.model_type == "own"
