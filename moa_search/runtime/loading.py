"""Loading a model that was saved under a plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from moa_search.formats import Plan
from moa_search.formats.checkpoint import CONFIG_ATTRIBUTE, PLAN_FILE, read_saved_plan
from moa_search.formats.transforms import KeyTransforms
from moa_search.modeling.adapters import adapter_tokens, load_adapter
from moa_search.modeling.generation import settings_of
from moa_search.modeling.private import optional_file
from moa_search.modeling.source import find_adapted
from moa_search.modeling.text import text_config
from moa_search.runtime.apply import apply_plan
from moa_search.runtime.rules import layer_rules

if TYPE_CHECKING:
    from moa_kernels.backends import Impl
    from transformers import PreTrainedModel

    from moa_search.formats.plan import PlanLike

OF_ONE_REPOSITORY = ("revision", "subfolder")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def from_pretrained(
    name: str | os.PathLike[str], *, plan: PlanLike | None = None, impl: Impl = "auto", **options: Any
) -> PreTrainedModel:
    """Load a model that `save_pretrained` wrote under a plan, and put it under that plan again.

    The plan is that of ``moa_plan.json`` beside the weights, or else the one in the configuration, and is checked
    before any weights are read. An adapter of PEFT's is put into the base model that it names.

    Args:
        name: Folder or hub id, of a model or an adapter.
        plan: The plan to use instead, as in `apply_plan`.
        impl: What attends, as in `apply_plan`.
        **options: For transformers' ``AutoModelForCausalLM.from_pretrained``, such as ``dtype`` and ``device_map``.
            ``attn_implementation`` is what `remove_plan` goes back to.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: There is no plan, there are two different ones, or its rules aren't anchored at positions.
        PlanFormatError: The plan is damaged.
        ModelMismatchError: It was made for another model.
        ModelUnsupportedError: The model's attention can't be replaced, or an adapter adds virtual tokens.
        ModelNotFoundError: An adapter's base model can't be found.
        BackendUnavailableError: Triton was asked for and can't run on the model's device or type.
    """
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    name = os.fspath(name)
    source = find_adapted(name, **hub)
    of_base = hub
    if source.adapter is not None:  # its revision is none of its base model's
        options = {key: value for key, value in options.items() if key not in OF_ONE_REPOSITORY} | source.options
        of_base = {key: value for key, value in hub.items() if key not in OF_ONE_REPOSITORY}
    config = options.get("config")
    if config is None:
        keys = ("trust_remote_code", "code_revision", "gguf_file")
        config = AutoConfig.from_pretrained(
            source.name, **of_base, **{key: options[key] for key in keys if key in options}
        )
    if plan is None:
        file = optional_file(name, PLAN_FILE, **hub)
        if file is not None:
            _fetch_transforms(name, file, hub)
        plan = read_saved_plan(name, file, getattr(text_config(config), CONFIG_ATTRIBUTE, None))
    else:
        plan = Plan.of(plan)
    layer_rules(plan, config)
    options = {**settings_of(source.name, **of_base), **options}
    options.setdefault("attn_implementation", None)  # not what the configuration says, which is the plan's
    model = AutoModelForCausalLM.from_pretrained(source.name, **options)
    if source.adapter is not None:
        model = load_adapter(model, source.adapter, adapter_tokens(source.adapter, **hub), **hub)
    return apply_plan(model, plan, impl=impl)


def _fetch_transforms(name: str, file: str, hub: dict[str, Any]) -> None:
    """Bring the transforms of keys that a plan names beside it, where it comes from the hub."""
    checksum = Plan.loads(Path(file).read_bytes(), source=file).transforms
    if checksum is not None:
        optional_file(name, KeyTransforms.file_name(checksum), **hub)
