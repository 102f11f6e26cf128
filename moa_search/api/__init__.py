"""What the commands do, as functions: every keyword argument is a flag and a YAML key of the same name.

Where files are asked for, functions also take what is in them (Plan, Profile); where a model is, also the pair that
`load_model` returns.

Heavy libraries are imported inside the functions, so that ``--help`` stays quick.
"""

from moa_search.api.comparing import compare_searchers
from moa_search.api.converting import export_plan, import_plan
from moa_search.api.evaluating import evaluate_model
from moa_search.api.hardware import measure_hardware
from moa_search.api.harness import run_harness
from moa_search.api.inspecting import diff_plans, inspect_front, inspect_plan, inspect_profile
from moa_search.api.measuring import measure_throughput
from moa_search.api.profiling import merge_profiles, profile_model
from moa_search.api.publishing import inspect_plans, push_plans
from moa_search.api.reporting import report_model
from moa_search.api.searching import search_front, search_plan
from moa_search.api.tuning import tune_plan
from moa_search.api.validating import validate_front

__all__ = [
    "compare_searchers",
    "diff_plans",
    "evaluate_model",
    "export_plan",
    "import_plan",
    "inspect_front",
    "inspect_plan",
    "inspect_plans",
    "inspect_profile",
    "measure_hardware",
    "measure_throughput",
    "merge_profiles",
    "profile_model",
    "push_plans",
    "report_model",
    "run_harness",
    "search_front",
    "search_plan",
    "tune_plan",
    "validate_front",
]
