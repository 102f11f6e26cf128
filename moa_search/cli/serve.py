"""``moa-serve``: vLLM's or transformers' OpenAI-compatible server with the model under a plan, on a smaller cache.

Either alone would load a folder that was saved under a plan dense, without a word: docs/serving.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from moa_search.cli.command import EXIT_BAD_INPUT
from moa_search.errors import ConfigError, MoAError

DESCRIPTION = """\
Serve a model under a plan through an OpenAI-compatible HTTP API, on top of vLLM where it is installed with moa-vllm,
else of `transformers serve`."""
EPILOG = """\
All other options are those of `vllm serve` or `transformers serve`, such as --host and --port.

examples:
  moa-serve folder-saved-under-a-plan --port 8000
  moa-serve org/model --plan plan.json
"""
ENGINES = ("auto", "vllm", "transformers")
REFUSED = {
    "--continuous-batching": "continuous batching can't run under a plan",
    "--attn-implementation": "the plan is the attention",
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(
        "moa-serve", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder saved under a plan; or any folder or Hub id, with --plan"
    )
    parser.add_argument("--plan", metavar="FILE", help="plan file, instead of the one saved beside the weights")
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="what serves; auto is vllm where it is installed (default)"
    )
    options, rest = parser.parse_known_args(arguments)
    vllm = options.engine == "vllm" or (options.engine == "auto" and _vllm_is_there())
    for flag, why in REFUSED.items():
        if any(given.split("=")[0] == flag for given in rest):
            parser.error(f"{flag}: {why}")
    try:
        if vllm:
            _serve_by_vllm(options.model, options.plan, rest)
        else:
            print(f"{parser.prog}: transformers serves {options.model}", file=sys.stderr)
            _serve(options.model, options.plan, rest)
    except MoAError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    sys.exit()


def _vllm_is_there() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("vllm", "moa_vllm"))


def _serve_by_vllm(model: str, plan: str | None, rest: Sequence[str]) -> None:
    if not _vllm_is_there():
        raise ConfigError("--engine vllm needs vLLM and moa-vllm; install them, or give --engine transformers")
    from moa_vllm.serve import serve

    serve(model, plan, rest)


def _serve(model: str, plan: str | None, rest: Sequence[str]) -> None:
    try:
        from transformers.cli import transformers as transformers_cli
        from transformers.cli.serving import model_manager
    except ImportError as error:
        raise ConfigError(
            f"serving needs the package {error.name}; install it with: pip install 'moa-search[serve]'"
        ) from None
    from moa_search.runtime import from_pretrained

    class PlannedModels(model_manager.ModelManager):  # type: ignore[misc]
        """Loads models as `transformers serve` does, each under the plan given or the one it was saved under."""

        def _load_model(
            self, model_id_and_revision: str, *args: Any, gguf_file: str | None = None, **kwargs: Any
        ) -> Any:
            name, revision = model_id_and_revision.split("@", 1)
            options = {"gguf_file": gguf_file, "quantization_config": self.get_quantization_config()}
            return from_pretrained(
                name,
                plan=plan,
                revision=revision,
                dtype=self.dtype,
                device_map=self.device,
                trust_remote_code=self.trust_remote_code,
                **{key: value for key, value in options.items() if value is not None},
            )

        def get_gen_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
            """What ``/v1/models`` lists: the model served, not what else the Hub's cache holds."""
            return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]

    replaced, before = model_manager.ModelManager, sys.argv
    model_manager.ModelManager = PlannedModels  # the class that `transformers serve` instantiates
    sys.argv = ["transformers", "serve", model, *rest]
    try:
        transformers_cli.main()
    finally:
        model_manager.ModelManager, sys.argv = replaced, before
