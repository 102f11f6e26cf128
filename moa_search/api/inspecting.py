"""Looking at plans, profiles and fronts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import Criterion, require_lengths, require_writable
from moa_search.api.converting import PlanFormat, export_plan, import_plan
from moa_search.api.options import load_profile
from moa_search.errors import ConfigError

if TYPE_CHECKING:
    from moa_search.formats import ModelSignature, Plan, PlanLike, Profile
    from moa_search.search import Front

__all__ = ["diff_plans", "inspect_front", "inspect_plan", "inspect_profile", "kind_of", "plan_titles"]

HEAD = re.compile(r"(\d+):(\d+)")


def inspect_plan(
    plan: str | PlanLike,
    *,
    lengths: Sequence[int] = (),
    output: str | None = None,
    html: str | None = None,
    heads: Sequence[str] = (),
    front: str | None = None,
    profile: str | Profile | None = None,
    model: str | Plan | ModelSignature | Any | None = None,
    fold_lengths: Sequence[int] = (),
    threshold: float | None = None,
    sparsity: float | None = None,
    sink: int | None = None,
    recent: int | None = None,
    trust_remote_code: bool = False,
    save: str | None = None,
    format: PlanFormat = "plan",
    reanchor: bool = False,
) -> Plan:
    """Show a plan, ours or another tool's: spans per layer and KV head, densities and how it was found.

    Args:
        plan: Plan file, MoA's alphas and betas, or DuoAttention's folder or table of scores; in Python also a Plan.
        lengths: Context lengths in tokens to show spans for; by default those the plan was made for.
        output: PNG file for a heat map of the spans.
        html: File for a page with all there is to see; it needs no network.
        heads: Of the page: whose masks to show, as LAYER:HEAD such as 7:2; by default some from the longest to the
            shortest span.
        front: Of the page: folder of moa-search whose front to show; by default the one that the plan lies in.
        profile: Of the page: profile file that predicts what each layer loses; in Python also a Profile.
        model: What other tools' plans were made for, since they don't say: a hub id, a folder, a plan or profile of
            the model, or layers=32,heads=32,kv_heads=8,head_dim=128 to look at it only; a plan of ours is checked.
        fold_lengths: MoA's plans: context lengths in tokens between which the rule of a KV head has to keep what its
            query heads' rules keep; by default everywhere, which may take more memory.
        threshold: DuoAttention's: heads with at least this score are dense (0.5 by default).
        sparsity: DuoAttention's: share of heads that aren't dense, instead of a threshold.
        sink: DuoAttention's: first tokens that the other heads keep; by default what the config.json beside it says.
        recent: DuoAttention's: newest tokens that they keep, likewise.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.
        save: File to write the plan to; for DuoAttention a folder.
        format: How to write it: ``plan`` as a plan of ours, ``moa`` as MoA's alphas and betas, ``duo`` as
            DuoAttention's folder.
        reanchor: ``moa``: write rules that are evaluated at every position, too; MoA evaluates them once, at the total
            length, so that earlier tokens attend more.

    Returns:
        The plan.

    Raises:
        MoAError: A file isn't valid or of another model, a head isn't there, or the format can't express the plan.
    """
    from moa_search.inspection.pages import plan_page
    from moa_search.inspection.plots import save_heat_map
    from moa_search.search import Front

    require_lengths(lengths=lengths)
    shown = _heads(heads)
    for name, value in (("heads", heads), ("front", front), ("profile", profile)):
        if value and html is None:
            raise ConfigError(f"{name}: it is for a page; give html, too")
    if save is None and (format != "plan" or reanchor):
        raise ConfigError(f"{'reanchor' if reanchor else 'format'}: it is for writing; give save, too")
    plan = _named(plan)
    _require_plan(plan)
    loaded = import_plan(
        plan,
        model=model,
        fold_lengths=fold_lengths,
        threshold=threshold,
        sparsity=sparsity,
        sink=sink,
        recent=recent,
        trust_remote_code=trust_remote_code,
    )
    require_writable(output)
    require_writable(html, "html")
    if html is not None:
        folder = _front_of(plan) if front is None else front
        page = plan_page(
            loaded,
            title=f"Plan {plan}" if isinstance(plan, str) else "Plan",
            lengths=lengths,
            heads=shown,
            front=None if folder is None else Front.load(folder),
            profile=None if profile is None else load_profile(profile),
        )
    if save is not None:
        export_plan(loaded, save, format=format, reanchor=reanchor)
    if output is not None:
        save_heat_map(loaded, output, lengths=list(lengths) or loaded.lengths)
    if html is not None:
        page.save(html)
    return loaded


def inspect_profile(
    profile: str | Profile,
    *,
    lengths: Sequence[int] = (),
    criterion: Criterion = "signed",
    heads: Sequence[str] = (),
    output: str | None = None,
    html: str | None = None,
) -> Profile:
    """Show a profile: its samples, whether they were enough, and what each head loses under a short window.

    Args:
        profile: Profile file; in Python also a Profile.
        lengths: Profiled lengths in tokens to show; by default all.
        criterion: How effects on the loss are summed up.
        heads: Of the page: whose losses to draw over the window, as LAYER:HEAD; by default those that lose most.
        output: PNG file for a heat map of what each head loses, at the longest length shown.
        html: File for a page with all there is to see; it needs no network.

    Returns:
        The profile.

    Raises:
        MoAError: The file is no valid profile, or a length or head isn't in it.
    """
    from moa_search.inspection.pages import profile_page
    from moa_search.inspection.plots import save_influence_map

    shown = _heads(heads)
    if heads and html is None:
        raise ConfigError("heads: it is for a page; give html, too")
    loaded = load_profile(profile)
    require_writable(output)
    require_writable(html, "html")
    for length in lengths:
        loaded.influence(length)  # refuses lengths that aren't there
    if html is not None:
        title = f"Profile {profile}" if isinstance(profile, str) else "Profile"
        profile_page(loaded, title=title, lengths=lengths, heads=shown, criterion=criterion).save(html)
    if output is not None:
        save_influence_map(loaded, output, length=max(lengths or loaded.lengths), criterion=criterion)
    return loaded


def diff_plans(
    plans: Sequence[str | PlanLike],
    *,
    lengths: Sequence[int] = (),
    output: str | None = None,
    html: str | None = None,
) -> list[Plan]:
    """Set two plans for one model side by side, and show the heads that they treat differently.

    Args:
        plans: Two plan files; in Python also Plans. One may be another tool's: it is taken to be for the other's model.
        lengths: Context lengths in tokens; by default those that the plans were made for.
        output: PNG file for a heat map of the change at the longest length.
        html: File for a page with all there is to see; it needs no network.

    Returns:
        Both plans.

    Raises:
        MoAError: There aren't two plans, a file is no valid plan, or they are for different models.
    """
    from moa_search.inspection.pages import diff_lengths, diff_page
    from moa_search.inspection.plots import save_diff_map

    if len(plans) != 2:
        raise ConfigError(f"plans: {len(plans)} given; a difference has two")
    both = [_named(plan, f"plan {place}") for place, plan in enumerate(plans, 1)]
    require_lengths(lengths=lengths)
    loaded = _read_pair(both)
    first, second = plan_titles(both)
    loaded[0].model.require(loaded[1].model, f"{first} (beside {second})")
    require_writable(output)
    require_writable(html, "html")
    if html is not None:
        diff_page(loaded, [first, second], lengths=lengths).save(html)
    if output is not None:
        save_diff_map(loaded, output, length=max(diff_lengths(loaded, lengths)))
    return loaded


def inspect_front(
    folder: str, *, lengths: Sequence[int] = (), output: str | None = None, html: str | None = None
) -> Front:
    """Show the plans that moa-search wrote to a folder, and which of them was chosen.

    Args:
        folder: Folder with plan.json and front/.
        lengths: Of the page: context lengths in tokens to show the chosen plan's spans for; by default those it was
            made for.
        output: PNG file for a chart of the plans' predicted losses.
        html: File for a page with all there is to see; it needs no network.

    Returns:
        The plans, of which none is chosen where there is no plan.json.

    Raises:
        MoAError: The folder holds no front, or a plan is damaged.
    """
    from moa_search.inspection.pages import front_page
    from moa_search.inspection.plots import save_front_plot
    from moa_search.search import Front

    require_lengths(lengths=lengths)
    loaded = Front.load(folder)
    require_writable(output)
    require_writable(html, "html")
    if html is not None:
        front_page(loaded, title=f"Front {folder}", lengths=lengths).save(html)
    if output is not None:
        save_front_plot(loaded, output)
    return loaded


def kind_of(path: str) -> Literal["plan", "profile", "front"]:
    """What a file or folder seems to be; a plan where it seems to be nothing, since that reader says why."""
    place = Path(path)
    if place.suffix == ".safetensors":
        return "profile"
    return "front" if place.is_dir() and _holds_front(place) else "plan"


def plan_titles(plans: Sequence[str | Plan]) -> list[str]:
    """What to call plans: the shortest ends of their paths that differ, or their places."""
    paths = [Path(plan) if isinstance(plan, str) else Path(f"plan {place}") for place, plan in enumerate(plans, 1)]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({place})" for place, path in enumerate(paths, 1)]


def _read_pair(plans: Sequence[str | Plan]) -> list[Plan]:
    """Two plans, of which one at least says which model it is for.

    Raises:
        MoAError: A file is no plan, or neither names its model.
    """
    from moa_search.formats import Plan
    from moa_search.formats.foreign import find_format

    for plan in plans:
        _require_plan(plan)
    own = [isinstance(plan, Plan) or find_format(plan) == "plan" for plan in plans]
    if not any(own):
        raise ConfigError(
            f"plans: neither {plans[0]} nor {plans[1]} says which model it is for; import one of them first: "
            f"moa-inspect {plans[0]} --model MODEL --save plan.json"
        )
    known = import_plan(plans[own.index(True)])
    return [import_plan(plan, model=None if is_own else known) for plan, is_own in zip(plans, own, strict=True)]


def _named(plan: str | PlanLike, name: str = "plan") -> str | Plan:
    """The path of a plan's file, which names it, or the plan."""
    from moa_search.formats import Plan

    return os.fspath(plan) if isinstance(plan, str | os.PathLike) else Plan.of(plan, name)


def _heads(heads: Sequence[str]) -> list[tuple[int, int]]:
    """``LAYER:HEAD`` as numbers."""
    found = []
    for text in heads:
        match = HEAD.fullmatch(text)
        if match is None:
            raise ConfigError(f"heads: {text!r} isn't LAYER:HEAD, such as 7:2")
        found.append((int(match[1]), int(match[2])))
    return found


def _front_of(plan: str | Plan) -> str | None:
    """The folder of moa-search that a plan lies in, if it holds a front."""
    if not isinstance(plan, str):
        return None
    parent = Path(plan).absolute().parent
    return next((str(folder) for folder in (parent, parent.parent) if _holds_front(folder)), None)


def _holds_front(folder: Path) -> bool:
    return next((folder / "front").glob("plan-*.json"), None) is not None


def _require_plan(plan: str | Plan) -> None:
    """Refuse what another command shows, and say which.

    Raises:
        ConfigError: It is a profile or a front.
    """
    kind = kind_of(plan) if isinstance(plan, str) else "plan"
    if kind != "plan":
        raise ConfigError(f"{plan}: it is a {kind}, no plan; look at it with moa-inspect {kind} {plan}")
