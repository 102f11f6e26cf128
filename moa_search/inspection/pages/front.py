"""A front as a page: its plans, and the spans of the chosen one."""

from __future__ import annotations

from collections.abc import Sequence

from moa_search.inspection.charts import chart, draw_front
from moa_search.inspection.frames.searches import front_frame
from moa_search.inspection.pages.page import Page, figure_block, new_page, origin_blocks, paragraph, span_blocks
from moa_search.inspection.printing import to_html
from moa_search.search import Front


def front_page(front: Front, *, title: str = "Front", lengths: Sequence[int] = ()) -> Page:
    """The page of a front.

    Args:
        front: The plans.
        title: Of the page.
        lengths: Context lengths in tokens for the chosen plan's spans; by default those that it was made for.
    """
    model = front.plans[0].model
    page = new_page(
        title,
        f"{len(front.plans)} plans for {model.architecture}, {model.num_hidden_layers} layers of "
        f"{model.num_key_value_heads} KV heads",
    )
    page.add("Front", *front_blocks(front))
    if front.chosen_index is None:
        page.add("Chosen plan", paragraph("The folder holds no plan.json, so no plan is chosen."))
        return page
    plan = front.chosen
    page.add("Chosen plan", *span_blocks(plan, list(lengths) or plan.lengths))
    page.add("Provenance", *origin_blocks(plan))
    return page


def front_blocks(front: Front) -> list[str]:
    """The plans of a front as chart and table, the chosen one marked."""
    table = to_html(front_frame(front))
    drawn = [i for i, plan in enumerate(front.plans) if plan.predicted and plan.predicted[-1].loss is not None]
    if len(drawn) < 2:
        return [table]
    plans, names = [front.plans[index] for index in drawn], [front.names[index] for index in drawn]
    marked = drawn.index(front.chosen_index) if front.chosen_index in drawn else None
    figure = chart(lambda ax: draw_front(ax, plans, names, marked), height=3.8)
    alt = f"Predicted losses of {len(drawn)} plans" + ("" if marked is None else ", a ring around the chosen one")
    beaten = "Plans that look beaten here lose less at another length." if len(plans[0].predicted) > 2 else ""
    return [figure_block(figure, alt, caption=beaten), table]
