"""The outer loop: settings of the exact search, tried on true loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa_search.api.common import load_profile, require_profile_fits, require_writable_folder, with_a_budget
from moa_search.api.validating import held_out_loss
from moa_search.options import SearchOptions, TuneOptions, takes

if TYPE_CHECKING:
    from moa_search.evaluation.true_loss import TrueLoss
    from moa_search.formats import Profile
    from moa_search.search.tuning import Summary, Tuning

FRONT_SEEDS = 4
"""Weightings of the lengths besides equal ones that a study begins with."""


@takes(TuneOptions)
def tune_plan(profile: str, options: TuneOptions) -> Summary:
    """Search settings of the exact search by the true loss of the plans they lead to.

    Each trial takes a few knobs (multipliers by depth, weights of the lengths, exponents of the influence, caution,
    criterion), solves exactly for a plan, runs the model under it on held-out samples, and Optuna learns which knobs
    pay. The same command resumes a stopped study.

    Args:
        profile: Profile file.
        options: As keywords, each described in `TuneOptions`.

    Returns:
        Where the study stands; the best plan is in the output folder.

    Raises:
        MoAError: The profile, a budget, the storage or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.errors import ConfigError
    from moa_search.search.budgets import Hardware
    from moa_search.search.searchers import find_searcher
    from moa_search.search.searching import make_space
    from moa_search.search.tuning import KnobSpace, Tuning, tune, tune_in_parallel
    from moa_search.search.tuning.storages import Location

    if options.densities and (options.density or len(options.densities) != 2):
        raise ConfigError("densities takes the smallest and the largest one, and density then isn't given")
    require_writable_folder(options.output)
    Location.parse(options.storage, options.output)  # a wrong one is told before the model is loaded
    statistics = load_profile(profile)
    asked = options.part(SearchOptions).replace(criterion=options.criteria[0], time_limit_s=options.time_limit_s)
    if options.densities:
        asked = asked.replace(density=[max(options.densities)])
    asked = with_a_budget(asked.replace(hardware=Hardware.of(asked.hardware)))
    plain = make_space(statistics, asked, find_searcher("exact"))  # no trial could keep a budget that is refused here
    space = KnobSpace(
        tuple(plain.weights),
        tuple(dict.fromkeys(options.criteria)),
        densities=None if not options.densities else (min(options.densities), max(options.densities)),
    )
    lengths = tuple(options.lengths or statistics.lengths)
    setup = _Setup(statistics, asked, options, lengths)
    tuning = Tuning(
        space,
        Path(options.output),
        options.trials,
        settings=setup.settings,
        storage=options.storage,
        name=options.study,
        sampler=options.sampler,
        seed=options.seed,
        workers=options.workers,
        with_cost=bool(options.densities),
    )
    weights = _front_weights(len(space.lengths))
    seeds = [space.default, *(space.of_weights(vector) for vector in weights)]
    seeds += [dataclasses.replace(space.default, criterion=name) for name in space.criteria[1:]]
    if options.workers == 1:
        run = setup.start(options.devices[0] if options.devices else "auto")
        cost = run.cost if tuning.with_cost else None
        summary = tune(tuning, run.decode, run.evaluate, seeds, cost)
    else:
        summary = tune_in_parallel(tuning, _worker, [setup], seeds, devices=options.devices)
    _export(tuning, summary, setup)
    return summary


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What every worker process needs to run trials; it can be pickled."""

    profile: Profile
    search: SearchOptions
    options: TuneOptions
    lengths: tuple[int, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What a trial's values depend on."""
        search, options = self.search, self.options
        return {
            "profile": self.profile.checksum,
            "model": options.model,
            "dtype": options.dtype,
            "density": list(search.density),
            "budget": list(search.budget),
            **({"kv_share": list(search.kv_share)} if search.kv_share else {}),
            **({} if search.tiers is None else {"tiers": list(search.tiers)}),
            "budget_lengths": list(search.budget_lengths or ()),
            "hardware": None if search.hardware is None else search.hardware.model_dump(),
            "weights_bytes": search.weights_bytes,
            "sources": list(options.sources),
            "sample lengths": list(self.lengths),
            "samples": options.samples,
            "sample seed": options.seed,
            "time_limit_s": search.time_limit_s,
        }

    def start(self, device: str | None) -> _Run:
        """Load the model and draw the samples."""
        from moa_search.modeling.loading import load_model
        from moa_search.search.tuning.decoding import Decoder

        model, tokenizer = load_model(self.options.model, device=device or "auto", **self.options.loading)
        require_profile_fits(self.profile, model)
        truth = held_out_loss(
            model,
            tokenizer,
            sources=self.options.sources,
            lengths=self.lengths,
            samples=self.options.samples,
            seed=self.options.seed,
            cache_folder=Path(self.options.output) / "validation",
        )
        longest = max(self.search.budget_lengths or self.profile.lengths)
        return _Run(Decoder(self.profile, self.search), truth, longest)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A worker's model and samples."""

    decode: Any
    truth: TrueLoss
    longest: int

    def evaluate(self, plan: Any) -> float:
        """True loss of a plan."""
        return self.truth.evaluate(plan)

    def cost(self, plan: Any) -> float:
        """Density of a plan at the longest budget length."""
        return float(plan.density(self.longest))


def _worker(index: int, device: str | None, tuning: Tuning, setup: _Setup) -> None:
    """Run trials in a process of its own."""
    from transformers.utils import logging

    from moa_search.progress import no_bars
    from moa_search.search.tuning import work

    logging.disable_progress_bar()
    with no_bars():  # they would write across the bar of all workers
        run = setup.start(device)
        work(tuning, run.decode, run.evaluate, run.cost if tuning.with_cost else None, worker=index)


def _front_weights(lengths: int) -> list[tuple[float, ...]]:
    """Weightings that the front would try, the extremes among them."""
    from moa_search.search.trade_off import lattice

    return lattice(lengths, 2)[1 : 1 + FRONT_SEEDS] if lengths > 1 else []


def _export(tuning: Tuning, summary: Summary, setup: _Setup) -> None:
    """Write the best plan as plan.json, and with two objectives the whole front."""
    from moa_search.search import Front
    from moa_search.search.tuning import plan_of
    from moa_search.search.tuning.decoding import Decoder

    if not summary.best:
        return
    decode = Decoder(setup.profile, setup.search)
    plans = [plan_of(tuning, result, decode) for result in summary.best]
    Front(plans).save(tuning.folder)
