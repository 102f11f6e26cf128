"""One worker of a study: asks for trials, decodes them into plans and runs the plans until there are enough."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moa_search.errors import BudgetInfeasibleError, SolverError
from moa_search.formats.files import one_line
from moa_search.formats.plan import Plan
from moa_search.progress import progress
from moa_search.search.tuning.config import Tuning
from moa_search.search.tuning.knobs import Knobs
from moa_search.search.tuning.quiet import quiet
from moa_search.search.tuning.storages import RETRIES, storage_errors

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

PLAN = "plan"
"""User attribute of a trial: its plan's fingerprint."""

REASON = "reason"
"""User attribute of a trial: why it has no value."""

SAME_AS = "same_as"
"""User attribute of a trial: number of an earlier trial with the same plan, whose values it has."""

SEED = "seed"
"""User attribute of a trial that was enqueued as one of the study's seeds: its place among them."""


def work(
    tuning: Tuning,
    decode: Callable[[Knobs], Plan],
    evaluate: Callable[[Plan], float],
    cost: Callable[[Plan], float] | None = None,
    *,
    worker: int = 0,
) -> None:
    """Run trials until the study has enough, together with any other workers.

    Args:
        tuning: The study.
        decode: Plan of a setting of the knobs.
        evaluate: True loss of a plan.
        cost: Its cost, where that is an objective.
        worker: Place of this process among the workers of this machine.

    Raises:
        ConfigError: The study can't be opened.
        TuningError: It can't be read or written any more.
        Exception: What ``decode`` or ``evaluate`` raise, but for plans that can't be had.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.study import MaxTrialsCallback
    from optuna.trial import TrialState

    assert (cost is not None) == tuning.with_cost, "a cost for two objectives, none for one"

    with storage_errors(tuning.location), quiet(), trial_bar(tuning) as report:
        study = tuning.open(worker)
        report(study)
        enough = MaxTrialsCallback(tuning.trials, states=(TrialState.COMPLETE, TrialState.PRUNED))
        while len(ended(study)) < tuning.trials:
            objective = _Objective(study, tuning, decode, evaluate, cost)
            try:
                study.optimize(objective, callbacks=[report, enough])
            except KeyboardInterrupt:
                _put_back(study, objective.number)
                raise
            except (ValueError, UpdateFinishedTrialError):
                if not objective.returned:
                    raise
                # This process seemed dead (asleep for minutes, say), and its trial was given to another.


@contextmanager
def trial_bar(tuning: Tuning) -> Iterator[Callable[..., None]]:
    """A bar of the trials that have ended, by any worker; what it yields is told the study."""
    with progress(what="Tuning", unit="trial", total=tuning.trials) as bar:

        def report(study: Study, trial: FrozenTrial | None = None) -> None:
            if not bar.disable:  # it takes a look into the storage
                bar.update(min(len(ended(study)), tuning.trials) - bar.n)

        yield report


class _Objective:
    """What Optuna runs for every trial.

    Attributes:
        number: The last trial's, once it has begun.
        returned: Whether its values were found.
    """

    def __init__(
        self,
        study: Study,
        tuning: Tuning,
        decode: Callable[[Knobs], Plan],
        evaluate: Callable[[Plan], float],
        cost: Callable[[Plan], float] | None,
    ) -> None:
        self.number: int | None = None
        self.returned = False
        self._study, self._tuning = study, tuning
        self._decode, self._evaluate, self._cost = decode, evaluate, cost

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        self.number, self.returned = trial.number, False
        knobs = self._tuning.space.suggest(trial)
        try:
            plan = self._decode(knobs)
        except (BudgetInfeasibleError, SolverError) as error:
            raise self._without_value(trial, one_line(error)) from None
        except Exception as error:
            trial.set_user_attr(REASON, one_line(f"{type(error).__name__}: {error}"))
            raise
        fingerprint = plan.fingerprint
        values = self._known_values(trial, fingerprint)
        if values is None:
            plan.save(self._tuning.plan_path(fingerprint))
            values = self._values(trial, plan)
        self.returned = True
        trial.set_user_attr(PLAN, fingerprint)
        return values

    def _values(self, trial: Trial, plan: Plan) -> tuple[float, ...]:
        try:
            values = [float(self._evaluate(plan))]
            if self._cost is not None:
                values.append(float(self._cost(plan)))
        except Exception as error:
            trial.set_user_attr(REASON, one_line(f"{type(error).__name__}: {error}"))
            raise
        if not all(map(math.isfinite, values)):
            raise self._without_value(trial, f"its loss or cost isn't finite: {', '.join(map(str, values))}")
        return tuple(values)

    def _known_values(self, trial: Trial, fingerprint: str) -> tuple[float, ...] | None:
        """Values of an earlier trial with the same plan."""
        for other in ended(self._study):
            if other.user_attrs.get(PLAN) == fingerprint and other.values is not None:
                trial.set_user_attr(SAME_AS, other.number)
                return tuple(other.values)
        return None

    def _without_value(self, trial: Trial, reason: str) -> Exception:
        import optuna

        trial.set_user_attr(REASON, reason)
        return optuna.TrialPruned(reason)


def ended(study: Study) -> list[FrozenTrial]:
    """Trials that count: with values, or without a plan or a finite loss."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def requeue(study: Study, trial: FrozenTrial, *, most: int | None = RETRIES) -> None:
    """Enqueue a failed trial's parameters again, at most ``most`` times in all; None sets no limit."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    with quiet():
        RetryHeartbeatStaleTrialCallback(max_retry=most)(study, copy.deepcopy(trial))


def _put_back(study: Study, number: int | None) -> None:
    """Enqueue an interrupted trial again."""
    from optuna.trial import TrialState

    if number is not None and (trial := study.get_trials(deepcopy=False)[number]).state == TrialState.FAIL:
        requeue(study, trial, most=None)
