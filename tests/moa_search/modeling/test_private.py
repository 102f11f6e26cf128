"""Private names of transformers stand in one file, and the installed version has them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_causal_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer

import moa_search
from moa_search.modeling import private

PACKAGE = Path(moa_search.__file__).parent
HOME = PACKAGE / "modeling" / "private.py"
PRIVATE = re.compile(r"_[a-zA-Z][a-zA-Z0-9_]*")
DEFINED = re.compile(rf"(?:def |\.|^ +)({PRIVATE.pattern})(?= *[(:=,])", re.MULTILINE)
"""A function, an attribute or a parameter."""

FOLDERS = (".", "distributed", "generation", "integrations", "models/auto", "utils")
"""What models of all kinds share."""

WITHOUT_TRANSFORMERS = ("search", "formats")
"""Where the import contracts forbid transformers; other libraries have private names, too."""


def names_in(source: str) -> set[str]:
    """Private names that code takes from an object, imports, passes as a keyword or spells as text."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in _OWN):
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg is not None:
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            found.update(alias.name for alias in node.names)
            found.update((node.module or "").split("."))
    return {name for name in found if PRIVATE.fullmatch(name)}


_OWN = ("self", "cls")


@pytest.fixture(scope="module")
def names_of_transformers() -> set[str]:
    """Private names that models of all kinds share."""
    root = Path(transformers.__file__).parent
    files = [file for folder in FOLDERS for file in (root / folder).glob("*.py")]
    assert len(files) > 50
    return {name for file in files for name in DEFINED.findall(file.read_text(encoding="utf-8"))}


def own_names() -> set[str]:
    """Private functions, classes and attributes that the package defines itself."""
    own: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in _OWN:
                    own.add(node.attr)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
    return own


HOOKS = {"_prepare_cache_for_generation", "_prefill"}
"""Functions of the runtime that have the name of the method they stand in for."""


def test_private_names_of_transformers_stand_in_one_file(names_of_transformers):
    foreign = names_of_transformers - own_names() | HOOKS
    elsewhere = {
        str(file.relative_to(PACKAGE)): found
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != HOME
        and file.relative_to(PACKAGE).parts[0] not in WITHOUT_TRANSFORMERS
        and (found := names_in(file.read_text(encoding="utf-8")) & foreign)
    }
    assert elsewhere == {}
    known = {"_attn_implementation", "_can_set_attn_implementation", "_compile_all_devices", "_tp_size"}
    known |= HOOKS | {"_gradient_checkpointing_func", "_raise_exceptions_for_missing_entries"}
    assert known <= names_in(HOME.read_text(encoding="utf-8")) & foreign, "what is looked for would be found"


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def test_the_installed_version_has_what_the_runtime_wraps():
    assert callable(getattr(LlamaForCausalLM, private.PREPARE_CACHE))
    assert callable(getattr(LlamaForCausalLM, private.PREFILL))
    assert callable(getattr(LlamaForCausalLM, private.CANDIDATES))


def test_the_installed_version_recomputes_by_the_attribute_that_is_set():
    class Layer(GradientCheckpointingLayer):
        def forward(self, states):
            return states

    asked = []
    layer = Layer()
    layer.gradient_checkpointing = True
    setattr(layer, private.CHECKPOINTING_FUNCTION, lambda function, *args: asked.append(args) or function(*args))
    assert layer.train()(1) == 1
    assert asked == [(1,)]


def test_facts_about_a_model(model):
    assert private.attention_of(model.config) == "sdpa"
    assert private.calls_attention_interface(model)
    assert private.generates_with_dynamic_cache(model)
    assert private.tensor_parallel_ranks(model) == 1


def test_a_missing_file_is_none(tmp_path):
    (tmp_path / "there.json").write_text("{}")
    assert private.optional_file(str(tmp_path), "absent.json") is None
    assert private.optional_file(str(tmp_path), "there.json") == str(tmp_path / "there.json")


def test_generate_compiles_on_a_cpu_and_forgets(model, monkeypatch):
    """Whether `generate` would compile, without paying for it."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    ids = torch.ones(1, 4, dtype=torch.long)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    config = CompileConfig(dynamic=False)
    private.compile_everywhere(config)
    assert not private.forget_compiled(model)
    model.generate(ids, compile_config=config, **options)
    assert len(compiled) == 1
    model.generate(ids, compile_config=config, **options)
    assert len(compiled) == 1, "kept"
    assert private.forget_compiled(model)
    model.generate(ids, compile_config=config, **options)
    assert len(compiled) == 2


def test_causal_masks_are_told_from_others():
    assert private.is_causal_mask(causal_mask_function)
    assert private.is_causal_mask(sliding_window_causal_mask_function(8))
    assert not private.is_causal_mask(and_masks(causal_mask_function, lambda b, h, q, k: k > 3))
    assert not private.is_causal_mask(lambda b, h, q, k: k <= q)


def test_kinds_of_language_models():
    causal, masked = private.language_model_kinds()
    assert {"llama", "qwen2", "gemma3_text"} <= causal
    assert "bert" in masked
    assert "llama" not in masked
