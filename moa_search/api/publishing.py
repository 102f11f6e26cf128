"""Plans put into, and looked at in, repositories of the Hugging Face hub."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from moa_search.errors import ConfigError
from moa_search.options import InspectPlansOptions, PushOptions, takes

if TYPE_CHECKING:
    from moa_search.formats import Plan


@takes(InspectPlansOptions)
def inspect_plans(folder: str, options: InspectPlansOptions) -> dict[str, Plan]:
    """List the plans of a folder, or of a repository of the Hugging Face hub.

    Args:
        folder: Folder of plans, or a repository such as org/plans.
        options: As keywords, each described in `InspectPlansOptions`.

    Returns:
        The plans by name, without their transforms of keys.

    Raises:
        MoAError: There is no such folder or repository, or a plan is damaged.
    """
    from moa_search.formats.hub import read_plans

    return read_plans(folder, **({} if options.revision is None else {"revision": options.revision}))


@takes(PushOptions)
def push_plans(plans: str, options: PushOptions) -> str:
    """Put a plan, or a folder of plans, into a repository of the Hugging Face hub, with a card written from them.

    Plans that are there stay, and the card lists them all.

    Args:
        plans: Plan file, or folder of plan files for one model.
        options: As keywords, each described in `PushOptions`.

    Returns:
        The commit's address.

    Raises:
        MoAError: There are no plans, they are for different models, or the repository can't be written.
    """
    from moa_search.formats import Plan, hub

    if os.path.isdir(plans):
        files = hub.plan_files(plans)
        if not files:
            raise ConfigError(f"{plans}: holds no plans; give a plan file, or a folder of them")
        loaded = {name: Plan.load(file) for name, file in files.items()}
    else:
        plan = Plan.load(plans)
        loaded = {os.path.basename(plans).removesuffix(".json"): plan}
    return hub.push_plans(
        loaded,
        options.repo,
        base_model=options.base_model,
        license=options.license,
        private=options.private,
        revision=options.revision,
        message=options.message,
        create_pr=options.create_pr,
    )
