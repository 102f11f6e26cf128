"""Plans and results for people: terminal tables and pictures."""

from moa_search.inspection.plots import plot_spans, save_heat_map
from moa_search.inspection.profiles import calibration_lines, profile_quality, profile_table, sample_advice
from moa_search.inspection.tables import (
    default_lengths,
    density_table,
    front_table,
    origin_lines,
    rule_table,
    score_tables,
    span_table,
)

__all__ = [
    "calibration_lines",
    "default_lengths",
    "density_table",
    "front_table",
    "origin_lines",
    "plot_spans",
    "profile_quality",
    "profile_table",
    "rule_table",
    "sample_advice",
    "save_heat_map",
    "score_tables",
    "span_table",
]
