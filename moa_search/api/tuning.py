"""The outer loop: settings of the exact search, tried on true loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import (
    Criterion,
    Dtype,
    require_positive,
    require_profile_fits,
    require_writable_folder,
)
from moa_search.api.options import load_profile, search_options
from moa_search.api.validating import held_out_loss

if TYPE_CHECKING:
    from moa_search.evaluation.true_loss import TrueLoss
    from moa_search.formats import Profile
    from moa_search.search import SearchOptions
    from moa_search.search.tuning import Summary, Tuning

__all__ = ["tune_plan"]

FRONT_SEEDS = 4
"""Weightings of the lengths besides equal ones that a study begins with."""


def tune_plan(
    profile: str,
    *,
    model: str,
    output: str,
    density: Sequence[float] | None = None,
    densities: Sequence[float] | None = None,
    budget_lengths: Sequence[int] | None = None,
    budget: Sequence[str] = (),
    hardware: str | None = None,
    weights_bytes: int | None = None,
    criteria: Sequence[Criterion] = ("signed", "squared"),
    trials: int = 60,
    sampler: Literal["tpe", "gp", "random"] = "tpe",
    storage: str | None = None,
    study: str = "tune",
    workers: int = 1,
    devices: Sequence[str] = (),
    sources: Sequence[str] = ("passkey", "copy"),
    lengths: Sequence[int] | None = None,
    samples: int = 16,
    dtype: Dtype = "auto",
    seed: int = 0,
    time_limit_s: float = 20.0,
    trust_remote_code: bool = False,
) -> Summary:
    """Search settings of the exact search by the true loss of the plans they lead to.

    Each trial takes a few knobs (multipliers by depth, weights of the lengths, exponents of the influence, caution,
    criterion), solves exactly for a plan, runs the model under it on held-out samples, and Optuna learns which knobs
    pay. The same command resumes a stopped study.

    Args:
        profile: Profile file.
        model: A Hub id, a model folder, a .gguf file, or "demo".
        output: Folder for plan.json, the study and what was measured.
        density: Largest share of the KV cache to keep, as for moa-search.
        densities: Smallest and largest density instead: the density becomes a knob, and loss and density are both
            minimised.
        budget_lengths: Lengths in tokens that the densities hold at, as for moa-search.
        budget: Budgets in other units, as for moa-search.
        hardware: For times, as for moa-search.
        weights_bytes: Size of the model's weights, as for moa-search.
        criteria: Criteria to choose from, the default first.
        trials: Plans to try, by all workers together.
        sampler: tpe, gp (needs scipy) or random.
        storage: Where the study is kept; a journal file in the output folder by default, or sqlite:///FILE
            for one worker; postgresql://USER@HOST/NAME for many machines, each of which runs this command.
        study: Name of the study in its storage.
        workers: Processes on this machine, each with its own copy of the model.
        devices: Given to the workers in turn, such as cuda:0 cuda:1.
        sources: What held-out samples are drawn from, as for moa-search validate.
        lengths: Tokens per held-out sample; by default the profiled lengths.
        samples: Held-out samples per length.
        dtype: Type of the weights, as for moa-profile.
        seed: Of the samples and the sampler.
        time_limit_s: Seconds for each solve.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.

    Returns:
        Where the study stands; the best plan is in the output folder.

    Raises:
        MoAError: The profile, a budget, the storage or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.errors import ConfigError
    from moa_search.search.searchers import find_searcher
    from moa_search.search.searching import make_space
    from moa_search.search.tuning import KnobSpace, Tuning, tune, tune_in_parallel
    from moa_search.search.tuning.storages import Location

    require_positive(trials=trials, samples=samples, workers=workers, time_limit_s=time_limit_s)
    if lengths is not None:
        require_positive(lengths=min(lengths, default=0))
    if densities is not None and (density or len(densities) != 2):
        raise ConfigError("densities takes the smallest and the largest one, and density then isn't given")
    require_writable_folder(output)
    Location.parse(storage, output)  # a wrong one is told before the model is loaded
    statistics = load_profile(profile)
    options = search_options(
        statistics,
        density=density if densities is None else [max(densities)],
        budget_lengths=budget_lengths,
        budget=budget,
        hardware=hardware,
        weights_bytes=weights_bytes,
        criterion=criteria[0],
        time_limit_s=time_limit_s,
    )
    plain = make_space(statistics, options, find_searcher("exact"))  # no trial could keep a budget that is refused here
    space = KnobSpace(
        tuple(plain.weights),
        tuple(dict.fromkeys(criteria)),
        densities=None if densities is None else (min(densities), max(densities)),
    )
    setup = _Setup(
        statistics,
        options,
        model,
        dtype,
        tuple(sources),
        tuple(lengths or statistics.lengths),
        samples,
        seed,
        output,
        trust_remote_code,
    )
    tuning = Tuning(
        space,
        Path(output),
        trials,
        settings=setup.settings,
        storage=storage,
        name=study,
        sampler=sampler,
        seed=seed,
        workers=workers,
        with_cost=densities is not None,
    )
    weights = _front_weights(len(space.lengths))
    seeds = [space.default, *(space.of_weights(vector) for vector in weights)]
    seeds += [dataclasses.replace(space.default, criterion=name) for name in space.criteria[1:]]
    if workers == 1:
        run = setup.start(devices[0] if devices else "auto")
        cost = run.cost if tuning.with_cost else None
        summary = tune(tuning, run.decode, run.evaluate, seeds, cost)
    else:
        summary = tune_in_parallel(tuning, _worker, [setup], seeds, devices=devices)
    _export(tuning, summary, setup)
    return summary


@dataclasses.dataclass(frozen=True)
class _Setup:
    """What every worker process needs to run trials; it can be pickled."""

    profile: Profile
    options: SearchOptions
    model: str
    dtype: Dtype
    sources: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    output: str
    trust_remote_code: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What a trial's values depend on."""
        options = self.options
        return {
            "profile": self.profile.checksum,
            "model": self.model,
            "dtype": self.dtype,
            "density": list(options.density),
            "budget": list(options.budgets),
            "budget_lengths": list(options.budget_lengths or ()),
            "hardware": None if options.hardware is None else options.hardware.model_dump(),
            "weights_bytes": options.weights_bytes,
            "sources": list(self.sources),
            "sample lengths": list(self.lengths),
            "samples": self.samples,
            "sample seed": self.seed,
            "time_limit_s": options.time_limit_s,
        }

    def start(self, device: str | None) -> _Run:
        """Load the model and draw the samples."""
        from moa_search.modeling.loading import load_model
        from moa_search.search.tuning.decoding import Decoder

        model, tokenizer = load_model(
            self.model, dtype=self.dtype, device=device or "auto", trust_remote_code=self.trust_remote_code
        )
        require_profile_fits(self.profile, model)
        truth = held_out_loss(
            model,
            tokenizer,
            sources=self.sources,
            lengths=self.lengths,
            samples=self.samples,
            seed=self.seed,
            cache_folder=Path(self.output) / "validation",
        )
        longest = max(self.options.budget_lengths or self.profile.lengths)
        return _Run(Decoder(self.profile, self.options), truth, longest)


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
    decode = Decoder(setup.profile, setup.options)
    plans = [plan_of(tuning, result, decode) for result in summary.best]
    Front(plans).save(tuning.folder)
