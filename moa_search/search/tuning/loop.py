"""The outer loop: Optuna over a few knobs, the exact solver as decoder, true loss as objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moa_search.errors import ConfigError, FileFormatError, SolverError, TuningError
from moa_search.formats.files import canonical_json
from moa_search.formats.plan import Plan
from moa_search.search.tuning.config import Tuning
from moa_search.search.tuning.knobs import Knobs, KnobSpace
from moa_search.search.tuning.quiet import quiet
from moa_search.search.tuning.storages import storage_errors
from moa_search.search.tuning.trials import PLAN, REASON, SAME_AS, SEED, ended, requeue, trial_bar, work
from moa_search.search.tuning.workers import run_workers

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class TrialResult:
    """A trial with values.

    Attributes:
        number: Its number in the study.
        values: Loss, then cost where that is an objective.
        knobs: Its setting.
        plan: Fingerprint of its plan.
        is_seed: Whether it was given to the study rather than found by it.
    """

    number: int
    values: tuple[float, ...]
    knobs: Knobs
    plan: str
    is_seed: bool


@dataclass(frozen=True)
class Summary:
    """Where a study stands.

    Attributes:
        counts: Trials by state, all of Optuna's: ``RUNNING`` (on other machines), ``COMPLETE``, ``PRUNED`` (no feasible
            plan, or no finite loss), ``FAIL`` (worker gone or stopped, or an error), ``WAITING``.
        best: The best trial, or with two objectives those that no other beats, by loss; equal plans once, seeds first.
        seeds_best: Least loss of a seed; None with two objectives, or without such a trial.
        tuned_best: Least loss of a trial that isn't a seed.
        reused: Trials that took the values of an earlier one with the same plan.
        remarks: What went wrong, a line each.
    """

    counts: dict[str, int]
    best: tuple[TrialResult, ...]
    seeds_best: float | None
    tuned_best: float | None
    reused: int
    remarks: tuple[str, ...]


def prepare(tuning: Tuning, seeds: Sequence[Knobs]) -> Study:
    """Before any worker: make the study, enqueue again what a killed command left running, enqueue new seeds.

    Raises:
        ConfigError: The study can't be opened or is another's; a seed doesn't fit.
    """
    params = [tuning.space.to_params(knobs) for knobs in seeds]
    study = tuning.open()
    _retry_lost(study, tuning)
    _enqueue(study, params)
    return study


def tune(
    tuning: Tuning,
    decode: Callable[[Knobs], Plan],
    evaluate: Callable[[Plan], float],
    seeds: Sequence[Knobs],
    cost: Callable[[Plan], float] | None = None,
) -> Summary:
    """Run a study in this process, from where it stands; arguments as for `work` and `prepare`."""
    with _at_work(tuning):
        study = prepare(tuning, seeds)
        work(tuning, decode, evaluate, cost)
        return summarise(study, tuning.space)


def tune_in_parallel(
    tuning: Tuning,
    target: Callable[..., None],
    arguments: Sequence[Any],
    seeds: Sequence[Knobs],
    *,
    devices: Sequence[str] = (),
) -> Summary:
    """Run a study in ``tuning.workers`` processes, from where it stands.

    Args:
        tuning: The study.
        target: A module's function ``target(index, device, tuning, *arguments)`` that calls `work` with
            ``worker=index``.
        arguments: Passed to it.
        seeds: As for `prepare`.
        devices: Given to the workers in turn.

    Raises:
        TuningError: Every worker ended before the last trial; what stopped them stands on their standard error. A
            study of which no trial had begun is removed, since its settings may be what was wrong.
    """
    with _at_work(tuning):
        study = prepare(tuning, seeds)
        with trial_bar(tuning) as watch:
            fates = run_workers(tuning.workers, target, [tuning, *arguments], devices, watch=lambda: watch(study))
            watch(study)
        if len(fates) == tuning.workers:
            _require_all(study, tuning)
        _retry_lost(study, tuning)  # of workers that were killed while the others worked on
        summary = summarise(study, tuning.space)
    return Summary(**{**vars(summary), "remarks": (*fates, *summary.remarks)})


@contextmanager
def _at_work(tuning: Tuning) -> Iterator[None]:
    """The study's file is this command's alone, and what goes wrong with it is one line."""
    with tuning.location.exclusive(), storage_errors(tuning.location):
        yield


def _retry_lost(study: Study, tuning: Tuning) -> None:
    """Fail trials that nobody runs any more, and enqueue them again.

    No other command is at a study in a file. In a database Optuna does this by itself once heartbeats are missed.
    """
    from optuna.trial import TrialState

    if tuning.location.path is None:
        return
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        requeue(study, trial)


def summarise(study: Study, space: KnobSpace) -> Summary:
    """Where a study stands."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    complete = [_result(trial, space) for trial in trials if trial.state == TrialState.COMPLETE]
    single = len(study.directions) == 1
    remarks = [
        f"trial {trial.number}: {trial.user_attrs.get(REASON, 'its worker is gone or was stopped')}"
        for trial in trials
        if trial.state in (TrialState.FAIL, TrialState.PRUNED)
    ]
    return Summary(
        counts=summary_counts(study),
        best=_undominated(complete),
        seeds_best=min((r.values[0] for r in complete if r.is_seed), default=None) if single else None,
        tuned_best=min((r.values[0] for r in complete if not r.is_seed), default=None) if single else None,
        reused=sum(SAME_AS in trial.user_attrs for trial in trials),
        remarks=tuple(remarks),
    )


def summary_counts(study: Study) -> dict[str, int]:
    """Trials by state, states without any included."""
    from optuna.trial import TrialState

    counts = Counter(trial.state.name for trial in study.get_trials(deepcopy=False))
    return {state.name: counts[state.name] for state in TrialState}


def plan_of(tuning: Tuning, result: TrialResult, decode: Callable[[Knobs], Plan]) -> Plan:
    """The plan of a trial: as it was run, or decoded again where another machine ran it.

    Raises:
        SolverError: Decoded again, it is another plan, as can happen under a time limit.
    """
    try:
        plan = Plan.load(tuning.plan_path(result.plan))
    except (ConfigError, FileFormatError):
        plan = decode(result.knobs)
    if plan.fingerprint != result.plan:
        raise SolverError(
            f"trial {result.number} ran another plan than its knobs now give; copy "
            f"{tuning.plan_path(result.plan).name} from the machine that ran it, or give the solver more time"
        )
    return plan


def _enqueue(study: Study, seeds: Sequence[dict[str, float | str]]) -> None:
    """Enqueue seeds that the study doesn't have; one that failed for good is tried again."""
    from optuna.trial import TrialState

    known = {
        canonical_json(trial.system_attrs.get("fixed_params"))
        for trial in study.get_trials(deepcopy=False)
        if SEED in trial.user_attrs and trial.state != TrialState.FAIL
    }
    for index, params in enumerate(seeds):
        if canonical_json(params) not in known:
            study.enqueue_trial(params, user_attrs={SEED: index})
            known.add(canonical_json(params))


def _require_all(study: Study, tuning: Tuning) -> None:
    """Refuse what workers left that all ended with an error or were killed."""
    import optuna

    done, counts = len(ended(study)), summary_counts(study)
    if done >= tuning.trials:
        return
    if sum(counts.values()) == counts["WAITING"]:
        with quiet():
            optuna.delete_study(study_name=tuning.name, storage=study._storage)
        raise TuningError("no worker could begin; what stopped each stands above")
    raise TuningError(
        f"all workers ended after {done} of {tuning.trials} trials, what stopped each stands above; the study is "
        "kept, and the same command resumes it"
    )


def _result(trial: FrozenTrial, space: KnobSpace) -> TrialResult:
    knobs = space.from_params(trial.params)
    return TrialResult(
        trial.number, tuple(trial.values), knobs, str(trial.user_attrs.get(PLAN, "")), SEED in trial.user_attrs
    )


def _undominated(results: Sequence[TrialResult]) -> tuple[TrialResult, ...]:
    """Results that no other beats in every value, by loss, the earliest of equal ones."""
    kept: list[TrialResult] = []
    for result in sorted(results, key=lambda result: (result.values, not result.is_seed, result.number)):
        if not any(all(a <= b for a, b in zip(other.values, result.values, strict=True)) for other in kept):
            kept.append(result)
    return tuple(kept)
