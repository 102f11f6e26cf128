"""One worker: every trial ends with a value or with the reason why it has none."""

import math
import os

import pytest
from optuna.trial import TrialState

from moa_search.errors import ConfigError
from moa_search.search.tuning.studies import open_study
from moa_search.search.tuning.trials import PLAN, REASON, SAME_AS, work
from tests.moa_search.search.tuning.tuning_helpers import SPACE, decode, mean_span, picky_decode, true_loss, tuning


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """A crash of the host isn't at test here, and waiting for its disk would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def trials(shared):
    return open_study(None, shared.folder, shared.name, ["minimize"] * (1 + shared.with_cost)).get_trials()


class Counting:
    """Counts evaluations, and raises or returns something else at some of them."""

    def __init__(self, special=None):
        self.plans, self.special = [], special or {}

    def __call__(self, plan):
        self.plans.append(plan.fingerprint)
        outcome = self.special.get(len(self.plans) - 1)
        if isinstance(outcome, BaseException):
            raise outcome
        return true_loss(plan) if outcome is None else outcome


def test_equal_plans_are_run_once_and_have_equal_values(tmp_path):
    shared, evaluate = tuning(tmp_path, 15), Counting()
    work(shared, lambda knobs: decode(SPACE.default), evaluate)
    done = trials(shared)
    assert len(done) == 15
    assert len(evaluate.plans) == 1
    assert {trial.value for trial in done} == {true_loss(decode(SPACE.default))}
    assert [trial.user_attrs.get(SAME_AS) for trial in done] == [None] + [0] * 14
    assert shared.plan_path(done[0].user_attrs[PLAN]).exists()


@pytest.mark.parametrize("with_cost", [False, True])
def test_settings_without_a_plan_are_told_apart_and_counted(tmp_path, with_cost):
    shared = tuning(tmp_path, 20, with_cost=with_cost)
    work(shared, picky_decode, true_loss, mean_span if with_cost else None)
    done = trials(shared)
    pruned = [trial for trial in done if trial.state.name == "PRUNED"]
    assert len(done) == 20
    assert 0 < len(pruned) < 20
    assert {trial.user_attrs[REASON] for trial in pruned} == {"made up: nothing is that robust"}
    assert all(len(trial.values) == 1 + with_cost for trial in done if trial not in pruned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_end_their_trial_only(tmp_path, value):
    shared = tuning(tmp_path, 3)
    work(shared, decode, Counting({1: value}))
    assert [trial.state.name for trial in trials(shared)] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert "isn't finite" in trials(shared)[1].user_attrs[REASON]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("a shape"), ConfigError("an option")])
def test_errors_stop_the_worker_and_leave_their_reason(tmp_path, error):
    shared = tuning(tmp_path, 3)
    with pytest.raises(type(error), match=str(error)):
        work(shared, decode, Counting({1: error}))
    assert [trial.state.name for trial in trials(shared)] == ["COMPLETE", "FAIL"]
    assert str(error) in trials(shared)[1].user_attrs[REASON]
    work(shared, decode, true_loss)
    assert sum(trial.state.name == "COMPLETE" for trial in trials(shared)) == 3


def test_an_interrupted_trial_is_put_back(tmp_path):
    shared = tuning(tmp_path, 4)
    with pytest.raises(KeyboardInterrupt):
        work(shared, decode, Counting({2: KeyboardInterrupt()}))
    assert [trial.state.name for trial in trials(shared)] == ["COMPLETE", "COMPLETE", "FAIL", "WAITING"]
    work(shared, decode, true_loss)
    done = trials(shared)
    assert done[3].params == done[2].params
    assert sum(trial.state.name == "COMPLETE" for trial in done) == 4


def test_a_result_that_comes_after_the_trial_was_given_away_is_dropped(tmp_path):
    """As for a laptop that slept: others took its worker for dead."""
    shared = tuning(tmp_path, 3)
    asleep = []

    def evaluate(plan):
        if not asleep:
            asleep.append(plan)
            study = open_study(None, tmp_path, shared.name, ["minimize"])
            study.tell(0, state=TrialState.FAIL)
        return true_loss(plan)

    work(shared, decode, evaluate)
    assert [trial.state.name for trial in trials(shared)] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]


def test_progress_counts_the_trials_of_all_workers(tmp_path, bars):
    shared = tuning(tmp_path, 3)
    study = shared.open()
    SPACE.suggest(trial := study.ask())
    study.tell(trial, 1.0)
    study.ask()  # another worker is at it
    work(shared, decode, true_loss)
    assert [trial.state.name for trial in trials(shared)] == ["COMPLETE", "RUNNING", "COMPLETE", "COMPLETE"]
    assert list(dict.fromkeys(bars["Tuning"])) == [(1, 3), (2, 3), (3, 3)]


def test_a_study_that_has_enough_is_left_alone(tmp_path):
    shared, evaluate = tuning(tmp_path, 2), Counting()
    work(shared, decode, evaluate)
    work(shared, decode, evaluate)
    assert len(trials(shared)) == 2


def test_with_a_seed_a_single_worker_repeats_itself(tmp_path):
    for name in ("a", "b"):
        work(tuning(tmp_path / name, 14, seed=5), decode, true_loss)
    first, second = (trials(tuning(tmp_path / name, 14)) for name in ("a", "b"))
    assert [trial.params for trial in first] == [trial.params for trial in second]
