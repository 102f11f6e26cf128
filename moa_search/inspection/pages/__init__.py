"""Plans, profiles, fronts and evaluations as self-contained HTML pages."""

from moa_search.inspection.pages.diff import diff_lengths, diff_line, diff_page
from moa_search.inspection.pages.front import front_page
from moa_search.inspection.pages.page import Page
from moa_search.inspection.pages.plan import plan_page
from moa_search.inspection.pages.profile import profile_page
from moa_search.inspection.pages.report import Report, report_markdown, report_page

__all__ = [
    "Page",
    "Report",
    "diff_lengths",
    "diff_line",
    "diff_page",
    "front_page",
    "plan_page",
    "profile_page",
    "report_markdown",
    "report_page",
]
