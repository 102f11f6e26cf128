"""The searchers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moa_search.api.common import (
    load_profile,
    model_and_tokenizer,
    note_missing_bits,
    require_profile_fits,
    require_writable_folder,
    with_a_budget,
)
from moa_search.api.validating import held_out_loss
from moa_search.options import CompareOptions, SearchOptions, takes
from moa_search.progress import progress

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.formats import Profile


@takes(CompareOptions)
def compare_searchers(profile: str | Profile, options: CompareOptions) -> pd.DataFrame:
    """Compare our search with the baselines at the same budget.

    Args:
        profile: Profile file.
        options: As keywords, each described in `CompareOptions`.

    Returns:
        One row per searcher: density, share of a 16-bit cache's bytes and predicted loss at every profiled length, key
        and value bits with the heads that have them, CPU seconds, and with ``validate`` the true losses. One that can't
        keep the budget has none of these, and a note that says why.

    Raises:
        MoAError: The profile, a budget or an option can't be used; see `moa_search.errors`.
    """
    import pandas as pd

    from moa_search.formats.files import write_csv
    from moa_search.inspection.frames.bits import tiers_text
    from moa_search.search.comparing import compare_searchers as compare
    from moa_search.search.comparing import default_searchers

    require_writable_folder(options.output)
    statistics = load_profile(profile)
    asked = with_a_budget(options.part(SearchOptions))
    note_missing_bits(statistics, asked)
    truth = None
    if options.validate is not None:
        network, tokenizer = model_and_tokenizer(options.validate, trust_remote_code=options.trust_remote_code)
        require_profile_fits(statistics, network)
        truth = held_out_loss(
            network,
            tokenizer,
            sources=("passkey", "copy"),
            lengths=list(options.lengths or statistics.lengths),
            samples=options.samples,
            cache_folder=None if options.output is None else Path(options.output) / "validation",
        )
    rows = []
    searchers = list(dict.fromkeys(options.searchers)) or default_searchers(statistics, asked)
    candidates = compare(statistics, asked, searchers)
    for candidate in candidates:
        plan = candidate.plan
        row: dict[str, object] = {"searcher": candidate.searcher, "bits": None}
        if plan is not None and not plan.is_plain:
            row["bits"] = tiers_text(plan)
        for length in statistics.lengths:
            loss, error = candidate.losses.get(length, (None, None))
            row |= {f"density@{length}": plan.density(length) if plan else None}
            row |= {f"share@{length}": plan.share(length) if plan else None}
            row |= {f"loss@{length}": loss, f"loss_error@{length}": error}
        rows.append(row | {"cpu_s": candidate.seconds, "note": candidate.note or None})
        if options.output is not None and plan is not None:
            plan.save(Path(options.output) / f"{candidate.searcher}.json")
    table = pd.DataFrame(rows)
    if truth is not None:
        plans = [(index, candidate.plan) for index, candidate in enumerate(candidates) if candidate.plan is not None]
        for index, plan in progress(plans, what="Validating", unit="searcher"):
            losses = truth.loss(plan)
            for length in truth.lengths:
                estimate = truth.mean(losses, length)
                table.loc[index, [f"true_loss@{length}", f"true_error@{length}"]] = [estimate.value, estimate.error]
    table.attrs |= {"lengths": list(statistics.lengths), "true_lengths": truth.lengths if truth else []}
    if options.output is not None:
        write_csv(table, Path(options.output) / "compare.csv")
    return table
