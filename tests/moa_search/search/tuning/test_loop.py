"""The outer loop as a whole: seeded, resumed, shared, and with nothing lost."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from optuna.trial import TrialState

from moa_search.errors import ConfigError, SolverError, TuningError
from moa_search.search.tuning.loop import plan_of, prepare, summarise, tune, tune_in_parallel
from tests.moa_search.search.tuning import tuning_helpers
from tests.moa_search.search.tuning.tuning_helpers import SPACE, decode, mean_span, true_loss, tuning

SEEDS = [SPACE.default, SPACE.of_weights([1, 0]), SPACE.of_weights([0, 1])]


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """A crash of the host isn't at test here, and waiting for its disk would be most of the time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def total(summary):
    return sum(summary.counts.values())


class TestTune:
    def test_seeds_come_first_and_the_best_is_at_least_as_good(self, tmp_path):
        shared = tuning(tmp_path, 30)
        summary = tune(shared, decode, true_loss, SEEDS)
        assert summary.counts == {"RUNNING": 0, "COMPLETE": 30, "PRUNED": 0, "FAIL": 0, "WAITING": 0}
        assert summary.seeds_best == min(true_loss(decode(seed)) for seed in SEEDS)
        assert summary.tuned_best < summary.seeds_best
        (best,) = summary.best
        assert best.values == (summary.tuned_best,)
        assert true_loss(decode(best.knobs)) == summary.tuned_best
        assert not best.is_seed
        assert [t.params for t in shared.open().get_trials()[:3]] == [SPACE.to_params(seed) for seed in SEEDS]

    def test_going_on_adds_trials_but_no_seeds(self, tmp_path):
        tune(tuning(tmp_path, 4), decode, true_loss, SEEDS)
        again = tune(tuning(tmp_path, 4), decode, true_loss, SEEDS)
        assert total(again) == 4
        more = tune(tuning(tmp_path, 7, sampler="random"), decode, true_loss, [*SEEDS, SPACE.of_weights([3, 1])])
        assert total(more) == 7
        marks = [t.user_attrs["seed"] for t in tuning(tmp_path, 7).open().get_trials() if "seed" in t.user_attrs]
        assert marks == [0, 1, 2, 3]

    def test_a_seed_that_failed_is_enqueued_again(self, tmp_path):
        def broken(plan):
            raise RuntimeError("made up")

        with pytest.raises(RuntimeError):
            tune(tuning(tmp_path, 4), decode, broken, SEEDS[:1])
        summary = tune(tuning(tmp_path, 4), decode, true_loss, SEEDS[:1])
        assert summary.seeds_best == true_loss(decode(SEEDS[0]))
        assert summary.remarks == ("trial 0: RuntimeError: made up",)

    @pytest.mark.parametrize(
        ("field", "change"),
        [
            ("profile", {"settings": {"profile": "another", "data": "sha256:1"}}),
            ("data", {"settings": {"profile": "sha256:0"}}),
            ("lengths that count", {"space": replace(SPACE, lengths=(512, 1024))}),
            ("fixed knobs", {"space": replace(SPACE, fixed={"robust": 1.0})}),
        ],
    )
    def test_other_settings_are_refused_by_name(self, tmp_path, field, change):
        prepare(tuning(tmp_path, 4), [])
        with pytest.raises(ConfigError, match=f"was made with {field} "):
            prepare(replace(tuning(tmp_path, 4), **change), [])

    def test_two_objectives(self, tmp_path):
        space = replace(SPACE, densities=(0.2, 0.8))
        shared = replace(tuning(tmp_path, 25), space=space, with_cost=True)
        summary = tune(shared, decode, true_loss, [space.default], mean_span)
        assert summary.counts["COMPLETE"] == 25
        values = [trial.values for trial in shared.open().get_trials()]
        for result in summary.best:
            assert not any(loss < result.values[0] and cost < result.values[1] for loss, cost in values)
        assert len(summary.best) == len({result.values for result in summary.best}) > 3
        assert all(0.2 <= result.knobs.density <= 0.8 for result in summary.best)
        assert summary.seeds_best is None

    def test_sqlite_serves_one_worker(self, tmp_path):
        shared = tuning(tmp_path, 3, storage=f"sqlite:///{tmp_path}/study.db")
        assert tune(shared, decode, true_loss, SEEDS).counts["COMPLETE"] == 3
        with pytest.raises(ConfigError, match="can't serve 2 workers"):
            prepare(replace(shared, workers=2), SEEDS)

    @pytest.mark.parametrize("storage", [None, "sqlite:///{}/study.db", "{}/elsewhere/study.journal"])
    def test_one_command_at_a_time_is_at_a_file(self, tmp_path, storage):
        shared = tuning(tmp_path, 3, storage=storage and storage.format(tmp_path))
        with shared.location.exclusive(), pytest.raises(ConfigError, match="another command is at this study"):
            tune(shared, decode, true_loss, SEEDS)
        assert tune(shared, decode, true_loss, SEEDS).counts["COMPLETE"] == 3

    @pytest.mark.parametrize("storage", [None, "sqlite:///{}/study.db"])
    def test_trials_that_a_killed_command_left_running_are_run_again(self, tmp_path, storage):
        shared = tuning(tmp_path, 3, storage=storage and storage.format(tmp_path))
        study = prepare(shared, SEEDS)
        SPACE.suggest(study.ask())
        study.ask()  # killed before anything was drawn
        summary = tune(shared, decode, true_loss, SEEDS)
        assert (summary.counts["COMPLETE"], summary.counts["RUNNING"], summary.counts["FAIL"]) == (3, 0, 2)
        assert summary.seeds_best == min(true_loss(decode(seed)) for seed in SEEDS)


class TestPlanOf:
    def test_the_plan_that_was_run_or_decoded_again(self, tmp_path):
        shared = tuning(tmp_path, 3)
        (best,) = tune(shared, decode, true_loss, SEEDS).best
        assert true_loss(plan_of(shared, best, lambda knobs: pytest.fail("it was saved"))) == best.values[0]
        shared.plan_path(best.plan).unlink()
        assert plan_of(shared, best, decode).fingerprint == best.plan

    def test_another_plan_is_refused(self, tmp_path):
        shared = tuning(tmp_path, 3)
        (best,) = tune(shared, decode, true_loss, SEEDS).best
        shared.plan_path(best.plan).write_text("torn")
        with pytest.raises(SolverError, match="another plan"):
            plan_of(shared, best, lambda knobs: decode(replace(knobs, density=1.0)))


class TestWorkers:
    def test_processes_share_the_trials(self, tmp_path, bars):
        shared = tuning(tmp_path, 14, workers=2)
        summary = tune_in_parallel(shared, tuning_helpers.worker, [0.05], SEEDS)
        assert summary.counts["COMPLETE"] in (14, 15), (
            "a worker finishes what it is at when the other ends the last one"
        )
        assert summary.counts["RUNNING"] == summary.counts["WAITING"] == 0
        assert summary.remarks == ()
        assert summary.tuned_best is not None
        assert bars["Tuning"][-1] == (14, 14)
        assert {path.name for path in tmp_path.glob("worker-*")} == {"worker-0", "worker-1"}

    @pytest.mark.parametrize("each", [0, 2])
    def test_workers_that_all_fail_are_an_error_and_the_study_is_kept(self, tmp_path, each):
        shared = tuning(tmp_path, 14, workers=2)
        with pytest.raises(TuningError, match=f"all workers ended after {2 * each} of 14 trials"):
            tune_in_parallel(shared, tuning_helpers.worker_that_fails, [each], SEEDS)
        assert summarise(shared.open(), SPACE).counts["COMPLETE"] == 2 * each

    def test_killed_workers_lose_nothing(self, tmp_path):
        """Both workers are killed in the middle of a trial, one after the other, and the study is resumed."""
        shared = tuning(tmp_path, 12)
        study = prepare(shared, SEEDS)
        for index, after in enumerate((2, 5)):
            self.kill_at_work(self.start(tmp_path, index), study, after)
        killed = [trial.number for trial in study.get_trials(states=(TrialState.RUNNING,))]
        assert len(killed) == 2
        summary = tune(shared, decode, true_loss, SEEDS)
        trials = study.get_trials()
        assert summary.counts["COMPLETE"] == 12
        assert summary.counts["RUNNING"] == summary.counts["WAITING"] == 0
        assert [trial.number for trial in trials if trial.state == TrialState.FAIL] == killed
        for number in killed:
            (again,) = [trial for trial in trials if trial.system_attrs.get("retry_history") == [number]]
            assert again.params == trials[number].params
            assert again.state == TrialState.COMPLETE
        seeds = [trial.user_attrs["seed"] for trial in trials if "seed" in trial.user_attrs and trial.values]
        assert sorted(seeds) == [0, 1, 2]
        assert summarise(study, SPACE) == summary

    def test_a_killed_worker_does_not_stop_the_others(self, tmp_path):
        shared = tuning(tmp_path, 8, workers=2)
        summary = tune_in_parallel(shared, tuning_helpers.worker_that_is_killed, [], SEEDS)
        assert summary.counts["COMPLETE"] == 8
        assert summary.counts["RUNNING"] == 0
        assert summary.counts["FAIL"] == summary.counts["WAITING"] == 1
        assert "killed by SIGKILL" in summary.remarks[0]

    def start(self, folder, index):
        arguments = [str(folder), str(folder / "study.journal"), "12", "0.5", str(index)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.Popen([sys.executable, tuning_helpers.__file__, *arguments], env=environment)

    def kill_at_work(self, worker, study, after):
        """Kill a worker in the middle of a trial once ``after`` trials have begun."""
        begun = [trial.number for trial in study.get_trials(states=(TrialState.RUNNING,))]
        while True:
            assert worker.poll() is None
            trials = study.get_trials(deepcopy=False)
            for trial in trials:
                drawn = len(trial.params) == len(SPACE.ranges) + 1
                if trial.number not in begun and drawn and trial.state == TrialState.RUNNING and len(trials) > after:
                    time.sleep(0.1)  # past the last write, during which it holds the journal's lock
                    worker.send_signal(signal.SIGKILL)
                    worker.wait()
                    return
            time.sleep(0.02)
