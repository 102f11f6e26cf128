"""Looking at plans, profiles and fronts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import load_profile, require_writable
from moa_search.api.converting import export_plan, import_plan
from moa_search.errors import ConfigError
from moa_search.formats.paged import require_paged
from moa_search.options import (
    DiffOptions,
    FrontPageOptions,
    ImportOptions,
    InspectPlanOptions,
    InspectProfileOptions,
    MemoryOptions,
    takes,
)

if TYPE_CHECKING:
    from moa_search.formats import Plan, PlanLike, Profile
    from moa_search.search import Front

HEAD = re.compile(r"(\d+):(\d+)")


@takes(InspectPlanOptions)
def inspect_plan(plan: str | PlanLike, options: InspectPlanOptions) -> Plan:
    """Show a plan, ours or another tool's: spans per layer and KV head, densities and how it was found.

    Args:
        plan: Plan file, another tool's file as `import_plan` takes it, or DuoAttention's folder.
        options: As keywords, each described in `InspectPlanOptions`.

    Returns:
        The plan; where it was written in a format that holds less, what that has of it.

    Raises:
        MoAError: A file isn't valid or of another model, a head isn't there, or the format can't express the plan.
    """
    from moa_search.inspection.pages import plan_page
    from moa_search.inspection.plots import save_heat_map
    from moa_search.search import Front

    shown = _heads(options.heads)
    priced = options.format in ("modelopt", "kvtuner") and options.profile is not None
    for name, value in (("heads", options.heads), ("front", options.front), ("profile", options.profile)):
        if value and options.html is None and not (name == "profile" and (priced or options.memory)):
            raise ConfigError(f"{name}: it is for a page; give html, too")
    writing = {"reanchor": options.reanchor, "format": options.format != "plan", "window_length": options.window_length}
    for name, given in writing.items():
        if given and options.save is None:
            raise ConfigError(f"{name}: it is for writing; give save, too")
    plan = _named(plan)
    _require_plan(plan)
    loaded: Plan = import_plan.__wrapped__(plan, options.part(ImportOptions))  # type: ignore[attr-defined]
    _require_memory_options(options)
    if options.vllm or (options.memory and options.engine == "vllm"):
        require_paged(loaded, plan if isinstance(plan, str) else "plan")
    require_writable(options.output)
    require_writable(options.html, "html")
    if options.save is not None:
        loaded = export_plan(
            loaded,
            options.save,
            format=options.format,
            reanchor=options.reanchor,
            window_length=options.window_length,
            profile=options.profile if priced else None,
        )
    if options.html is not None:
        folder = _front_of(plan) if options.front is None else options.front
        page = plan_page(
            loaded,
            title=f"Plan {plan}" if isinstance(plan, str) else "Plan",
            lengths=options.lengths,
            heads=shown,
            front=None if folder is None else Front.load(folder),
            profile=None if options.profile is None else load_profile(options.profile),
        )
    if options.output is not None:
        save_heat_map(loaded, options.output, lengths=list(options.lengths) or loaded.lengths)
    if options.html is not None:
        page.save(options.html)
    return loaded


@takes(InspectProfileOptions)
def inspect_profile(profile: str | Profile, options: InspectProfileOptions) -> Profile:
    """Show a profile: its samples, whether they were enough, and what each head loses under a short window.

    Args:
        profile: Profile file.
        options: As keywords, each described in `InspectProfileOptions`.

    Returns:
        The profile.

    Raises:
        MoAError: The file is no valid profile, or a length or head isn't in it.
    """
    from moa_search.inspection.pages import profile_page
    from moa_search.inspection.plots import save_influence_map

    shown = _heads(options.heads)
    if options.heads and options.html is None:
        raise ConfigError("heads: it is for a page; give html, too")
    loaded = load_profile(profile)
    require_writable(options.output)
    require_writable(options.html, "html")
    for length in options.lengths:
        loaded.influence(length)  # refuses lengths that aren't there
    if options.html is not None:
        title = f"Profile {profile}" if isinstance(profile, str) else "Profile"
        page = profile_page(loaded, title=title, lengths=options.lengths, heads=shown, criterion=options.criterion)
        page.save(options.html)
    if options.output is not None:
        save_influence_map(
            loaded, options.output, length=max(options.lengths or loaded.lengths), criterion=options.criterion
        )
    return loaded


@takes(DiffOptions)
def diff_plans(plans: Sequence[str | PlanLike], options: DiffOptions) -> list[Plan]:
    """Set two plans for one model side by side, and show the heads that they treat differently.

    Args:
        plans: Two plan files. One may be another tool's: it is taken to be for the other's model.
        options: As keywords, each described in `DiffOptions`.

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
    loaded = _read_pair(both)
    first, second = plan_titles(both)
    loaded[0].model.require(loaded[1].model, f"{first} (beside {second})")
    require_writable(options.output)
    require_writable(options.html, "html")
    if options.html is not None:
        diff_page(loaded, [first, second], lengths=options.lengths).save(options.html)
    if options.output is not None:
        save_diff_map(loaded, options.output, length=max(diff_lengths(loaded, options.lengths)))
    return loaded


@takes(FrontPageOptions)
def inspect_front(folder: str, options: FrontPageOptions) -> Front:
    """Show the plans that moa-search wrote to a folder, and which of them was chosen.

    Args:
        folder: Folder with plan.json and front/.
        options: As keywords, each described in `FrontPageOptions`.

    Returns:
        The plans, of which none is chosen where there is no plan.json.

    Raises:
        MoAError: The folder holds no front, or a plan is damaged.
    """
    from moa_search.inspection.pages import front_page
    from moa_search.inspection.plots import save_front_plot
    from moa_search.search import Front

    loaded = Front.load(folder)
    require_writable(options.output)
    require_writable(options.html, "html")
    if options.html is not None:
        front_page(loaded, title=f"Front {folder}", lengths=options.lengths).save(options.html)
    if options.output is not None:
        save_front_plot(loaded, options.output)
    return loaded


def weights_of(model: Any, profile: Any, weights_bytes: int | None, trust_remote_code: bool = False) -> int:
    """Bytes of the weights of the model that a plan is for: as told, or of the profile or model at 16 bits each.

    Args:
        model: A hub id, a folder or a profile's file; others don't tell.
        profile: Profile, or its file.
        weights_bytes: As told.
        trust_remote_code: As for `load_config`.

    Raises:
        ConfigError: None of them tells.
    """
    if weights_bytes is not None:
        return weights_bytes
    is_profile = isinstance(model, str) and model.endswith(".safetensors")
    for file in (profile, model if is_profile else None):
        if file is not None and (known := load_profile(file).header.weights_bytes) is not None:
            return known
    if isinstance(model, str) and not is_profile and not model.endswith(".json") and "=" not in model:
        from moa_search.modeling.loading import count_parameters

        return 2 * count_parameters(model, trust_remote_code=trust_remote_code)
    raise ConfigError(
        "memory: nothing tells the size of the weights; give model, or a profile that does, or weights_bytes"
    )


def _require_memory_options(options: InspectPlanOptions) -> None:
    """Refuse options of the memory table without it."""
    for name, field in MemoryOptions.model_fields.items():
        if not options.memory and getattr(options, name) != field.default:
            raise ConfigError(f"{name}: it is for the table of memory; give memory, too")


def kind_of(path: str) -> Literal["plan", "profile", "front", "plans"]:
    """What a file, folder or repository seems to be; a plan where it seems nothing, since that reader says why."""
    from moa_search.formats.hub import SCHEME, looks_like_repository, plan_files

    place = Path(path)
    if place.suffix == ".safetensors":
        return "profile"
    if place.is_dir():
        return "front" if _holds_front(place) else "plans" if plan_files(place) else "plan"
    return "plans" if path.startswith(SCHEME) and looks_like_repository(path.removeprefix(SCHEME)) else "plan"


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
        ConfigError: It is a profile, a front or a folder of plans.
    """
    kind = kind_of(plan) if isinstance(plan, str) else "plan"
    if kind != "plan":
        what = "folder of plans" if kind == "plans" else kind
        raise ConfigError(f"{plan}: it is a {what}, no plan; look at it with moa-inspect {kind} {plan}")
