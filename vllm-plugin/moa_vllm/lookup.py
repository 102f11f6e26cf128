"""Which plan a configuration of vLLM names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from moa_search.errors import ConfigError
from moa_search.formats import Plan
from moa_search.formats.checkpoint import CONFIG_ATTRIBUTE, PLAN_FILE, read_saved_plan

OPTION = "moa_plan"
"""Key of ``--additional-config``: a plan file, a plan's content, or false to serve a saved folder without its plan."""

GROUPS_OPTION = "moa_groups"

VARIABLE = "MOA_PLAN"
"""Environment variable with a plan file."""

GROUPS_VARIABLE = "MOA_GROUPS"

GPU_OPTION = "moa_gpu"
"""Key of ``--additional-config``: true to try a plan on a GPU, where it hasn't been tested within vLLM."""

GPU_VARIABLE = "MOA_GPU"


@dataclass(frozen=True)
class Named:
    """A plan, and who named it.

    Attributes:
        plan: The plan.
        source: Names it in errors.
        groups: Groups of heads that were asked for, if any.
    """

    plan: Plan
    source: str
    groups: int | None


def names_plan(config: Any) -> bool:
    """Whether some plan is named, readable or not."""
    option = _options(config).get(OPTION)
    if option is not None:
        return option is not False
    return bool(os.environ.get(VARIABLE)) or any(_saved(config))


def declines_plan(config: Any) -> bool:
    """Whether a saved folder's plan is to be left out."""
    return _options(config).get(OPTION) is False


def tries_gpu(config: Any) -> bool:
    """Whether a plan is to be tried on a GPU."""
    return _options(config).get(GPU_OPTION) is True or os.environ.get(GPU_VARIABLE) == "1"


def find_plan(config: Any) -> Named | None:
    """The plan for a configuration: of ``--additional-config``, of the environment, or saved with the model.

    Args:
        config: A ``VllmConfig``.

    Raises:
        ConfigError: What is named is no file, or the number of groups is no positive number.
        PlanFormatError: It can't be read as a plan.
    """
    if not names_plan(config):
        return None
    options, groups = _options(config), _groups(config)
    option = options.get(OPTION)
    if isinstance(option, dict):
        return Named(_parse(json.dumps(option), OPTION), OPTION, groups)
    if option is not None and not isinstance(option, str):
        raise ConfigError(f"{OPTION}: {option!r} is neither a plan file, nor a plan's content, nor false")
    path = option or os.environ.get(VARIABLE)
    if path:
        return Named(Plan.load(path), path, groups)
    file, content = _saved(config)
    model = str(config.model_config.model)
    return Named(read_saved_plan(model, file, content), model, groups)


def _options(config: Any) -> dict[str, Any]:
    options = config.additional_config
    return options if isinstance(options, dict) else {}


def _groups(config: Any) -> int | None:
    given = _options(config).get(GROUPS_OPTION, os.environ.get(GROUPS_VARIABLE))
    if given in (None, ""):
        return None
    try:
        groups = int(given)
    except (TypeError, ValueError):
        groups = 0
    if groups < 1 or isinstance(given, bool):
        raise ConfigError(f"{GROUPS_OPTION}: {given!r} is no number of groups; give 1 or more")
    return groups


def _saved(config: Any) -> tuple[Path | None, dict[str, Any] | None]:
    """The file beside the weights, where they lie in a folder, and what config.json holds."""
    if config.model_config is None:
        return None, None
    file = Path(str(config.model_config.model)) / PLAN_FILE
    content = getattr(config.model_config.hf_text_config, CONFIG_ATTRIBUTE, None)
    return (file if file.is_file() else None), content


@lru_cache(maxsize=4)
def _parse(text: str, source: str) -> Plan:
    return Plan.loads(text, source=source)
