"""Options of commands and API functions: each described, typed, bounded and read in one place.

Importing it loads neither torch nor transformers.
"""

from moa_search.formats.foreign import PlanFormat
from moa_search.options.base import Options, takes
from moa_search.options.groups import (
    BudgetOptions,
    Criterion,
    Dtype,
    HeldOutOptions,
    ModelOptions,
    PlanOptions,
    Searcher,
)
from moa_search.options.inspecting import (
    DiffOptions,
    ExportOptions,
    FrontPageOptions,
    ImportOptions,
    InspectPlanOptions,
    InspectPlansOptions,
    InspectProfileOptions,
    MemoryOptions,
    PushOptions,
)
from moa_search.options.running import (
    EvalOptions,
    HarnessOptions,
    MergeOptions,
    ProfileOptions,
    ReportOptions,
    ThroughputOptions,
    WayKind,
)
from moa_search.options.searching import (
    CompareOptions,
    FrontOptions,
    HardwareOptions,
    SearchOptions,
    TuneOptions,
    ValidateOptions,
    ValidationOptions,
)

__all__ = [
    "BudgetOptions",
    "CompareOptions",
    "Criterion",
    "DiffOptions",
    "Dtype",
    "EvalOptions",
    "ExportOptions",
    "FrontOptions",
    "FrontPageOptions",
    "HardwareOptions",
    "HarnessOptions",
    "HeldOutOptions",
    "ImportOptions",
    "InspectPlanOptions",
    "InspectPlansOptions",
    "InspectProfileOptions",
    "MemoryOptions",
    "MergeOptions",
    "ModelOptions",
    "Options",
    "PlanFormat",
    "PlanOptions",
    "ProfileOptions",
    "PushOptions",
    "ReportOptions",
    "SearchOptions",
    "Searcher",
    "ThroughputOptions",
    "TuneOptions",
    "ValidateOptions",
    "ValidationOptions",
    "WayKind",
    "takes",
]
