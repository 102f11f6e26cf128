"""The searchers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moa_search.api.common import (
    Criterion,
    Searcher,
    model_and_tokenizer,
    require_positive,
    require_profile_fits,
    require_writable_folder,
)
from moa_search.api.options import load_profile, search_options
from moa_search.api.validating import held_out_loss
from moa_search.progress import progress

if TYPE_CHECKING:
    import pandas as pd

    from moa_search.formats import Profile

__all__ = ["compare_searchers"]


def compare_searchers(
    profile: str | Profile,
    *,
    density: Sequence[float] | None = None,
    budget_lengths: Sequence[int] | None = None,
    budget: Sequence[str] = (),
    hardware: str | None = None,
    weights_bytes: int | None = None,
    searchers: Sequence[Searcher] = ("exact", "moa", "duo", "per-layer", "recall", "uniform"),
    criterion: Criterion = "signed",
    anchor: Literal["position", "prompt"] = "position",
    time_limit_s: float = 60.0,
    validate: str | None = None,
    lengths: Sequence[int] | None = None,
    samples: int = 16,
    output: str | None = None,
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """Compare our search with the baselines at the same budget.

    Args:
        profile: Profile file; in Python also a Profile.
        density: Largest share of the KV cache to keep, as for moa-search.
        budget_lengths: Lengths in tokens that the densities hold at, as for moa-search.
        budget: Budgets in other units, as for moa-search.
        hardware: For times, as for moa-search.
        weights_bytes: Size of the model's weights, as for moa-search.
        searchers: Which to compare.
        criterion: What all plans are judged by, and chosen by where a searcher has no criterion of its own.
        anchor: Where a rule is evaluated.
        time_limit_s: Seconds for each solve.
        validate: Model to measure the true loss of every plan with, on held-out samples.
        lengths: Tokens per held-out sample; by default the profiled lengths.
        samples: Held-out samples per length.
        output: Folder to write every plan, compare.csv and measured losses to.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.

    Returns:
        One row per searcher: density and predicted loss at every profiled length, CPU seconds, and with ``validate``
        the true losses.

    Raises:
        MoAError: The profile, a budget or an option can't be used; see `moa_search.errors`.
    """
    import pandas as pd

    from moa_search.formats.files import write_csv
    from moa_search.search.comparing import compare_searchers as compare

    require_positive(time_limit_s=time_limit_s, samples=samples)
    if lengths is not None:
        require_positive(lengths=min(lengths, default=0))
    require_writable_folder(output)
    statistics = load_profile(profile)
    options = search_options(
        statistics,
        density=density,
        budget_lengths=budget_lengths,
        budget=budget,
        hardware=hardware,
        weights_bytes=weights_bytes,
        criterion=criterion,
        anchor=anchor,
        time_limit_s=time_limit_s,
    )
    truth = None
    if validate is not None:
        network, tokenizer = model_and_tokenizer(validate, trust_remote_code=trust_remote_code)
        require_profile_fits(statistics, network)
        truth = held_out_loss(
            network,
            tokenizer,
            sources=("passkey", "copy"),
            lengths=list(lengths or statistics.lengths),
            samples=samples,
            cache_folder=None if output is None else Path(output) / "validation",
        )
    rows = []
    candidates = compare(statistics, options, list(dict.fromkeys(searchers)))
    for candidate in candidates:
        row: dict[str, object] = {"searcher": candidate.searcher}
        for length, (loss, error) in candidate.losses.items():
            row |= {f"density@{length}": candidate.plan.density(length)}
            row |= {f"loss@{length}": loss, f"loss_error@{length}": error}
        rows.append(row | {"cpu_s": candidate.seconds})
        if output is not None:
            candidate.plan.save(Path(output) / f"{candidate.searcher}.json")
    table = pd.DataFrame(rows)
    if truth is not None:
        for index, candidate in enumerate(progress(candidates, what="Validating", unit="searcher")):
            losses = truth.loss(candidate.plan)
            for length in truth.lengths:
                estimate = truth.mean(losses, length)
                table.loc[index, [f"true_loss@{length}", f"true_error@{length}"]] = [estimate.value, estimate.error]
    table.attrs |= {"lengths": list(candidates[0].losses), "true_lengths": truth.lengths if truth else []}
    if output is not None:
        write_csv(table, Path(output) / "compare.csv")
    return table
