"""Plans and results for people: terminal tables and pictures."""

from moa_search.inspection.plots import plot_spans, save_heat_map
from moa_search.inspection.profiles import calibration_lines, profile_quality, profile_table, sample_advice
from moa_search.inspection.scores import effective_context_table, effective_lines, score_tables
from moa_search.inspection.searches import (
    budget_lines,
    comparison_table,
    front_table,
    plot_densities,
    save_density_plot,
    study_lines,
    study_table,
    validation_table,
)
from moa_search.inspection.tables import (
    density_table,
    origin_lines,
    rule_table,
    span_table,
)

__all__ = [
    "budget_lines",
    "calibration_lines",
    "comparison_table",
    "density_table",
    "effective_context_table",
    "effective_lines",
    "front_table",
    "origin_lines",
    "plot_densities",
    "plot_spans",
    "profile_quality",
    "profile_table",
    "rule_table",
    "sample_advice",
    "save_density_plot",
    "save_heat_map",
    "score_tables",
    "span_table",
    "study_lines",
    "study_table",
    "validation_table",
]
