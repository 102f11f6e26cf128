"""Where a saved model says under which plan it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moa_search.errors import ConfigError
from moa_search.formats.plan import Plan

CONFIG_ATTRIBUTE = "moa_plan"
"""Attribute of a text decoder's configuration that holds the plan as plain data."""

PLAN_FILE = "moa_plan.json"
"""The plan's file beside the weights."""


def read_saved_plan(name: str, file: str | os.PathLike[str] | None, content: dict[str, Any] | None) -> Plan:
    """The plan of a saved model.

    Args:
        name: Names the model in errors.
        file: Its `PLAN_FILE`, if it has one.
        content: What `CONFIG_ATTRIBUTE` of its configuration holds, if anything.

    Raises:
        PlanFormatError: One of the two is damaged.
        ConfigError: There is neither, or they act differently.
    """
    if file is None and content is None:
        raise ConfigError(
            f"{name}: neither {PLAN_FILE} nor its config.json holds a plan; give plan, or load it without"
        )
    beside = None if file is None else Plan.load(file)
    within = None if content is None else Plan.loads(json.dumps(content), source=str(Path(name) / "config.json"))
    if beside is not None and within is not None and beside.fingerprint != within.fingerprint:
        raise ConfigError(
            f"{name}: {PLAN_FILE} and config.json hold different plans; give plan, or save the model again"
        )
    chosen = beside or within
    assert chosen is not None
    return chosen
