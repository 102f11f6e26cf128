"""`transformers serve` with every model under a plan: an OpenAI-compatible server on a cache that keeps less.

Usage: python scripts/serve_under_plan.py MODEL [--plan plan.json] [options of transformers serve, such as --port 8000]

MODEL is a folder that was saved under a plan, or any folder or Hub id together with --plan. `transformers serve` alone
would load such a folder dense; see docs/serving.md.
"""

import argparse
import sys
from typing import Any

from transformers.cli import transformers as transformers_cli
from transformers.cli.serving import model_manager

import moa_search

REFUSED = {
    "--continuous-batching": "continuous batching can't run under a plan",
    "--attn-implementation": "the plan is the attention",
}


class PlannedModels(model_manager.ModelManager):
    """Loads models as `transformers serve` does, each under a plan: the one given, or that it was saved under."""

    plan: str | None = None

    def _load_model(self, model_id_and_revision: str, *args: Any, gguf_file: str | None = None, **kwargs: Any) -> Any:
        name, revision = model_id_and_revision.split("@", 1)
        options = {"gguf_file": gguf_file, "quantization_config": self.get_quantization_config()}
        return moa_search.from_pretrained(
            name,
            plan=self.plan,
            revision=revision,
            dtype=self.dtype,
            device_map=self.device,
            trust_remote_code=self.trust_remote_code,
            **{key: value for key, value in options.items() if value is not None},
        )

    def get_gen_models(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """What ``/v1/models`` lists: what is served, not what else the Hub's cache holds."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--plan", help="plan file, instead of the one beside the weights")
    options, rest = parser.parse_known_args()
    for flag, why in REFUSED.items():
        if any(given.split("=")[0] == flag for given in rest):
            parser.error(f"{flag}: {why}")
    PlannedModels.plan = options.plan
    model_manager.ModelManager = PlannedModels  # what Serve makes when it starts
    sys.argv = ["transformers", "serve", options.model, *rest]
    try:
        transformers_cli.main()
    except moa_search.MoAError as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()
