"""``moa-inspect``: show a plan, ours or another tool's, and convert it; show a profile, a front, or two plans."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import diff_plans, inspect_front, inspect_plan, inspect_plans, inspect_profile
from moa_search.api.inspecting import kind_of, plan_titles
from moa_search.cli.command import Command, open_console
from moa_search.cli.subcommands import run_any

CHANGES = 12
"""Changed heads in a terminal's table."""

if TYPE_CHECKING:
    from moa_search.formats import Plan, Profile
    from moa_search.formats.memory import Engine
    from moa_search.inspection.printing import Table
    from moa_search.search import Front


def show(plan: Plan, /, *, lengths: Sequence[int], save: str | None, vllm: bool, memory: bool, **options: Any) -> None:
    """Print origin, densities, rules and spans."""
    from moa_search.inspection.frames.plans import held_frame, plan_facts, plan_frame, rule_frame, span_frame
    from moa_search.inspection.printing import fact_lines, to_rich

    shown = list(lengths) or plan.lengths
    console = open_console()
    notes = plan.provenance.notes if plan.provenance else ()
    for line in [*fact_lines(plan_facts(plan)), *(fact_lines({"note": note})[0] for note in notes)]:
        console.print(line, highlight=False)
    tables = [plan_frame(plan, shown), rule_frame(plan), span_frame(plan, max(shown))]
    for table in _memory_tables(plan, shown, **options) if memory else tables:
        console.print(to_rich(table))
    if vllm:
        console.print(to_rich(held_frame(plan, shown)))
    _say_written("heat map", **options)
    if save is not None:
        print(f"plan written to {save}")


def _memory_tables(
    loaded: Plan,
    lengths: Sequence[int],
    *,
    context: Sequence[int],
    batch: int,
    engine: Engine,
    card: Sequence[float],
    model: Any,
    profile: Any,
    weights_bytes: int | None,
    trust_remote_code: bool,
    **_: Any,
) -> Sequence[Table]:
    from moa_search.api.inspecting import weights_of
    from moa_search.inspection.frames.memory import card_frame, memory_frame

    at, weights = list(context) or list(lengths), weights_of(model, profile, weights_bytes, trust_remote_code)
    return memory_frame(loaded, at, batch, weights, engine), card_frame(loaded, at, batch, weights, engine, card)


def show_profile(profile: Profile, /, *, lengths: Sequence[int], criterion: str, **options: Any) -> None:
    """Print what was measured, how well, and which heads lose most."""
    from moa_search.inspection.frames.profiles import head_frame, profile_facts, profile_tables
    from moa_search.inspection.printing import fact_lines, to_rich
    from moa_search.inspection.quality import sample_advice

    console = open_console()
    for line in fact_lines(profile_facts(profile)):
        console.print(line, highlight=False)
    heads = [head_frame(profile, length, criterion) for length in lengths or profile.lengths]
    for table in [*profile_tables(profile), *heads]:
        console.print(to_rich(table))
    advice = sample_advice(profile)
    if advice is not None:
        console.print(f"[yellow]more samples?[/yellow] {advice}", highlight=False)
    _say_written("heat map", **options)


def show_diff(loaded: list[Plan], /, *, plans: Sequence[str], lengths: Sequence[int], **options: Any) -> None:
    """Print what both keep, and the largest changes."""
    from moa_search.inspection.frames.plans import change_frame, plan_frame
    from moa_search.inspection.pages import diff_lengths, diff_line
    from moa_search.inspection.printing import to_rich

    console = open_console()
    at, names = diff_lengths(loaded, lengths), plan_titles(plans)
    console.print(diff_line(loaded, at), highlight=False)
    console.print(to_rich(plan_frame(dict(zip(names, loaded, strict=True)), at)))
    if loaded[0].fingerprint != loaded[1].fingerprint:
        console.print(to_rich(change_frame(loaded, names, max(at), CHANGES)))
    _say_written("heat map", **options)


def show_front(front: Front, /, *, folder: str, **options: Any) -> None:
    """Print the plans of a front."""
    from moa_search.inspection.frames.searches import front_frame
    from moa_search.inspection.printing import to_rich

    open_console().print(to_rich(front_frame(front)))
    if front.chosen_index is None:
        print(f"{folder} holds no plan.json, so no plan is chosen")
    _say_written("chart", **options)


def show_plans(plans: dict[str, Plan], /, *, folder: str, lengths: Sequence[int], **_: Any) -> None:
    """Print what each plan keeps and loses."""
    from moa_search.inspection.frames.plans import plans_frame
    from moa_search.inspection.printing import to_rich

    open_console().print(to_rich(plans_frame(plans, lengths)))
    name = next(iter(plans))
    print(f'to use one: Plan.from_pretrained("{folder.removeprefix("hf://")}", "{name}")')


def _say_written(picture: str, *, output: str | None, html: str | None, **_: Any) -> None:
    if output is not None:
        print(f"{picture} written to {output}")
    if html is not None:
        print(f"page written to {html}")


COMMANDS = {
    "plan": Command(
        "shows a plan, and converts it",
        inspect_plan,
        show,
        examples=("moa-inspect plan plans/plan.json --html plan.html --output spans.png",),
    ),
    "profile": Command(
        "shows a profile",
        inspect_profile,
        show_profile,
        examples=("moa-inspect profile profile.safetensors --html profile.html",),
    ),
    "diff": Command(
        "sets two plans side by side",
        diff_plans,
        show_diff,
        examples=("moa-inspect diff a.json b.json --html diff.html",),
    ),
    "plans": Command(
        "lists the plans of a folder, or of a repository of the Hugging Face hub",
        inspect_plans,
        show_plans,
        examples=("moa-inspect plans out", "moa-inspect plans org/plans"),
    ),
    "front": Command(
        "shows the plans in moa-search's folder",
        inspect_front,
        show_front,
        examples=("moa-inspect front plans --html front.html",),
    ),
}


def main() -> NoReturn:
    """Entry point."""
    run_any("moa-inspect", COMMANDS[command_for(sys.argv[1:])], COMMANDS, otherwise="a file")


def command_for(words: Sequence[str]) -> str:
    """The command for a line that names none: what its file is, or a difference where it begins with two files."""
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    if len(files) > 1:
        return "diff"
    return kind_of(files[0]) if files else "plan"
