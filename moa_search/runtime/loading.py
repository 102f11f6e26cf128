"""Loading a model that was saved under a plan."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from moa_search.formats import Plan
from moa_search.formats.checkpoint import CONFIG_ATTRIBUTE, PLAN_FILE, read_saved_plan
from moa_search.formats.transforms import KeyTransforms
from moa_search.modeling.generation import settings_of
from moa_search.modeling.private import optional_file
from moa_search.modeling.text import text_config
from moa_search.runtime.apply import apply_plan
from moa_search.runtime.rules import layer_rules

if TYPE_CHECKING:
    from moa_kernels.backends import Impl
    from transformers import PreTrainedModel

    from moa_search.formats.plan import PlanLike

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def from_pretrained(
    name: str | os.PathLike[str], *, plan: PlanLike | None = None, impl: Impl = "auto", **options: Any
) -> PreTrainedModel:
    """Load a model that `save_pretrained` wrote under a plan, and put it under that plan again.

    The plan is that of ``moa_plan.json`` beside the weights, or else the one in the configuration, and is checked
    before any weights are read.

    Args:
        name: Folder or hub id.
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
        ModelUnsupportedError: The model's attention can't be replaced.
        BackendUnavailableError: Triton was asked for and can't run on the model's device or type.
    """
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    config = options.get("config")
    if config is None:
        trusted = {key: options[key] for key in ("trust_remote_code", "code_revision") if key in options}
        config = AutoConfig.from_pretrained(name, **hub, **trusted)
    if plan is None:
        file = optional_file(os.fspath(name), PLAN_FILE, **hub)
        if file is not None:
            _fetch_transforms(os.fspath(name), file, hub)
        plan = read_saved_plan(os.fspath(name), file, getattr(text_config(config), CONFIG_ATTRIBUTE, None))
    else:
        plan = Plan.of(plan)
    layer_rules(plan, config)
    options = {**settings_of(os.fspath(name), **hub), **options}
    options.setdefault("attn_implementation", None)  # not what the configuration says, which is the plan's
    return apply_plan(AutoModelForCausalLM.from_pretrained(name, **options), plan, impl=impl)


def _fetch_transforms(name: str, file: str, hub: dict[str, Any]) -> None:
    """Bring the transforms of keys that a plan names beside it, where it comes from the hub."""
    checksum = Plan.loads(Path(file).read_bytes(), source=file).transforms
    if checksum is not None:
        optional_file(name, KeyTransforms.file_name(checksum), **hub)
