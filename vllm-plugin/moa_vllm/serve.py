"""vLLM's OpenAI-compatible server, started by ``moa-serve``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from moa_search.errors import ConfigError, MoAError
from moa_search.formats.checkpoint import read_saved_plan
from moa_search.modeling.source import find_source
from moa_vllm.lookup import OPTION, find_plan


def serve(model: str, plan: str | None, rest: Sequence[str]) -> None:
    """Serve until interrupted.

    Args:
        model: Folder, hub id or ``demo``.
        plan: Plan file; by default the plan that the folder was saved under.
        rest: Further options of ``vllm serve``.

    Raises:
        MoAError: The model can't be served by vLLM under a plan.
    """
    source = find_source(model)
    if source.options or source.adapter is not None:
        raise ConfigError(
            f"{model}: vLLM reads folders with safetensors; merge or convert it, or give --engine transformers"
        )
    import vllm
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser("moa-serve"))
    arguments = parser.parse_args([source.name, *rest])
    arguments.model = arguments.model_tag
    arguments.served_model_name = arguments.served_model_name or [model]
    if plan is not None:
        # Engines may run in another folder.
        arguments.additional_config = {**(arguments.additional_config or {}), OPTION: os.path.abspath(plan)}
    validate_parsed_serve_args(arguments)
    named = find_plan(_checked(AsyncEngineArgs.from_cli_args(arguments)))
    if named is None:
        read_saved_plan(model, None, None)  # says what is missing
    assert named is not None
    print(f"moa-serve: vLLM {vllm.__version__} serves {model} under the plan of {named.source}", file=sys.stderr)
    ServeSubcommand.cmd(arguments)


def _checked(arguments: object) -> object:
    """The configuration, in which a plan is looked up and refused; our errors come out of it as they were raised."""
    from pydantic import ValidationError

    try:
        return arguments.create_engine_config()  # type: ignore[attr-defined]
    except ValidationError as error:
        for entry in error.errors():
            cause = entry.get("ctx", {}).get("error")
            if isinstance(cause, MoAError):
                raise cause from None
        raise
