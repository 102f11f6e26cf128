"""Find how far each attention head has to look, and run the model with a KV cache that keeps only that.

Names are imported on first use, so that ``import moa_search`` and ``--help`` load neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moa_search.version import __version__

if TYPE_CHECKING:
    from moa_search.api import (
        compare_searchers,
        evaluate_model,
        export_plan,
        import_plan,
        measure_throughput,
        merge_profiles,
        profile_model,
        push_plans,
        report_model,
        run_harness,
        search_front,
        search_plan,
        tune_plan,
        validate_front,
    )
    from moa_search.errors import MoAError
    from moa_search.formats import ModelSignature, Plan, Profile
    from moa_search.modeling.loading import load_model
    from moa_search.runtime import MoACache, applied, apply_plan, from_pretrained, remove_plan
    from moa_search.spans import SpanRule

_HOMES = {
    "MoACache": "moa_search.runtime",
    "MoAError": "moa_search.errors",
    "ModelSignature": "moa_search.formats",
    "Plan": "moa_search.formats",
    "Profile": "moa_search.formats",
    "SpanRule": "moa_search.spans",
    "applied": "moa_search.runtime",
    "apply_plan": "moa_search.runtime",
    "compare_searchers": "moa_search.api",
    "evaluate_model": "moa_search.api",
    "export_plan": "moa_search.api",
    "from_pretrained": "moa_search.runtime",
    "import_plan": "moa_search.api",
    "load_model": "moa_search.modeling.loading",
    "measure_throughput": "moa_search.api",
    "merge_profiles": "moa_search.api",
    "profile_model": "moa_search.api",
    "push_plans": "moa_search.api",
    "remove_plan": "moa_search.runtime",
    "report_model": "moa_search.api",
    "run_harness": "moa_search.api",
    "search_front": "moa_search.api",
    "search_plan": "moa_search.api",
    "tune_plan": "moa_search.api",
    "validate_front": "moa_search.api",
}

__all__ = [
    "MoACache",
    "MoAError",
    "ModelSignature",
    "Plan",
    "Profile",
    "SpanRule",
    "__version__",
    "applied",
    "apply_plan",
    "compare_searchers",
    "evaluate_model",
    "export_plan",
    "from_pretrained",
    "import_plan",
    "load_model",
    "measure_throughput",
    "merge_profiles",
    "profile_model",
    "push_plans",
    "remove_plan",
    "report_model",
    "run_harness",
    "search_front",
    "search_plan",
    "tune_plan",
    "validate_front",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
