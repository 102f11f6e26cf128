"""Trials whose worker is gone are found and tried again; those of living workers are left alone."""

import json
import os
import subprocess
import sys

import optuna
import pytest
from optuna.trial import TrialState

from moa_search.search.tuning import claims
from moa_search.search.tuning.claims import CLAIM, RETRIES, Reclaimer, claim, state_of
from moa_search.search.tuning.studies import open_study

SPACE = {"x": optuna.distributions.FloatDistribution(0, 1)}


def dead_claim():
    """The claim of a process that has ended."""
    program = "from moa_search.search.tuning.claims import claim; import json; print(json.dumps(claim()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def dead():
    return dead_claim()


@pytest.fixture
def study(tmp_path):
    return open_study(None, tmp_path, "tune", ["minimize"])


def begin(study, owner):
    trial = study.ask(SPACE)
    if owner is not None:
        trial.set_user_attr(CLAIM, owner)
    return trial.number


def states(study):
    return [trial.state.name for trial in study.get_trials()]


class TestStateOf:
    def test_this_process_lives_and_one_that_ended_does_not(self, dead):
        assert state_of(claim()) == "alive"
        assert state_of(dead) == "dead"

    def test_a_killed_child_that_nobody_has_waited_for_is_dead(self):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        owner = {**claim(), "pid": child.pid, "started": claims._started(child.pid)}
        assert state_of(owner) == "alive"
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the table of processes
        assert state_of(owner) == "dead"
        child.stdin.close()
        child.wait()

    def test_a_process_id_used_again_is_another_process(self):
        assert state_of({**claim(), "started": 1}) == "dead"

    def test_a_host_that_started_anew(self):
        assert state_of({**claim(), "boot": "another"}) == "dead"

    @pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"namespace": "pid:[1]"}])
    def test_other_machines_and_containers_cannot_be_seen(self, elsewhere):
        assert state_of({**claim(), **elsewhere}) == "elsewhere"

    def test_without_proc(self, monkeypatch, tmp_path, dead):
        monkeypatch.setattr(claims, "PROC", tmp_path)
        assert state_of(claim()) == "alive"
        assert state_of({**claim(), "pid": dead["pid"]}) == "dead"


class TestReclaimer:
    def test_only_lost_trials_are_tried_again_with_their_parameters(self, study, dead):
        begin(study, claim())
        lost = begin(study, dead)
        begin(study, {**claim(), "host": "another"})
        assert Reclaimer(study)() == [lost]
        assert states(study) == ["RUNNING", "FAIL", "RUNNING", "WAITING"]
        again = study.ask(SPACE)
        assert again.params == study.trials[lost].params
        assert CLAIM not in again.user_attrs
        assert Reclaimer(study)() == []
        assert Reclaimer(study).elsewhere() == {2: "another"}

    def test_everywhere_takes_those_of_other_machines(self, study):
        begin(study, {**claim(), "host": "another"})
        begin(study, claim())
        assert Reclaimer(study)(everywhere=True) == [0]

    def test_a_seed_stays_a_seed(self, study, dead):
        study.enqueue_trial({"x": 0.25}, user_attrs={"seed": 0})
        begin(study, dead)
        Reclaimer(study)()
        again = study.ask(SPACE)
        assert again.params == {"x": 0.25}
        assert again.user_attrs["seed"] == 0

    def test_killed_before_it_drew_anything(self, study, dead):
        study.ask().set_user_attr(CLAIM, dead)
        Reclaimer(study)()
        assert states(study) == ["FAIL"]
        study.enqueue_trial({"x": 0.25})
        study.ask().set_user_attr(CLAIM, dead)
        Reclaimer(study)()
        assert states(study) == ["FAIL", "FAIL", "WAITING"]
        assert study.ask(SPACE).params == {"x": 0.25}

    def test_a_trial_that_kills_its_workers_is_given_up(self, study, dead):
        for _ in range(RETRIES + 1):
            begin(study, dead)
            Reclaimer(study)()
        assert states(study) == ["FAIL"] * (RETRIES + 1)
        assert len({trial.params["x"] for trial in study.trials}) == 1

    def test_one_that_says_no_worker_has_half_a_minute(self, study, monkeypatch):
        begin(study, None)
        reclaim = Reclaimer(study)
        assert reclaim() == []
        monkeypatch.setattr(claims, "UNCLAIMED_SECONDS", 0.0)
        assert reclaim() == [0]

    def test_of_two_that_look_at_once_one_tries_again(self, study, dead, monkeypatch):
        begin(study, dead)
        stale = study.get_trials()
        Reclaimer(study)()
        with monkeypatch.context() as patch:
            patch.setattr(study, "get_trials", lambda **_: stale)
            assert Reclaimer(study)() == []
        assert states(study) == ["FAIL", "WAITING"]
        assert study.get_trials(states=(TrialState.WAITING,))[0].params == stale[0].params
