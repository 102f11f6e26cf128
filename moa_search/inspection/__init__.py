"""Plans and results for people: terminal tables, pictures and pages."""

from moa_search.inspection.differences import change_table, diff_lengths, diff_line, diff_page, pair_table
from moa_search.inspection.fronts import front_page, save_front_plot, stored_front_table
from moa_search.inspection.plan_page import plan_page
from moa_search.inspection.plots import plot_spans, save_diff_map, save_heat_map, save_influence_map
from moa_search.inspection.profile_page import profile_page
from moa_search.inspection.profiles import (
    calibration_lines,
    head_table,
    profile_quality,
    profile_table,
    sample_advice,
)
from moa_search.inspection.scores import effective_context_table, effective_lines, harness_table, score_tables
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
from moa_search.inspection.throughput import (
    fact_lines,
    gain_table,
    plot_throughput,
    save_throughput_plot,
    throughput_table,
)

__all__ = [
    "budget_lines",
    "calibration_lines",
    "change_table",
    "comparison_table",
    "density_table",
    "diff_lengths",
    "diff_line",
    "diff_page",
    "effective_context_table",
    "effective_lines",
    "fact_lines",
    "front_page",
    "front_table",
    "gain_table",
    "harness_table",
    "head_table",
    "origin_lines",
    "pair_table",
    "plan_page",
    "plot_densities",
    "plot_spans",
    "plot_throughput",
    "profile_page",
    "profile_quality",
    "profile_table",
    "rule_table",
    "sample_advice",
    "save_density_plot",
    "save_diff_map",
    "save_front_plot",
    "save_heat_map",
    "save_influence_map",
    "save_throughput_plot",
    "score_tables",
    "span_table",
    "stored_front_table",
    "study_lines",
    "study_table",
    "throughput_table",
    "validation_table",
]
