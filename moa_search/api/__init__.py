"""What the commands do, as functions: every keyword argument is a flag and a YAML key of the same name.

Heavy libraries are imported inside the functions, so that ``--help`` stays quick.
"""

from moa_search.api.common import Criterion, Dtype, Searcher
from moa_search.api.comparing import compare_searchers
from moa_search.api.converting import PlanFormat, export_plan, import_plan
from moa_search.api.evaluating import evaluate_model
from moa_search.api.inspecting import inspect_plan
from moa_search.api.profiling import merge_profiles, profile_model
from moa_search.api.reporting import report_model
from moa_search.api.searching import search_front, search_plan
from moa_search.api.tuning import serve_study, tune_plan
from moa_search.api.validating import validate_front

__all__ = [
    "Criterion",
    "Dtype",
    "PlanFormat",
    "Searcher",
    "compare_searchers",
    "evaluate_model",
    "export_plan",
    "import_plan",
    "inspect_plan",
    "merge_profiles",
    "profile_model",
    "report_model",
    "search_front",
    "search_plan",
    "serve_study",
    "tune_plan",
    "validate_front",
]
