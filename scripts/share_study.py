"""Four workers share a study, one is killed with SIGKILL: is every trial accounted for? scripts/try_postgresql runs it.

Usage:
    python scripts/share_study.py STORAGE FOLDER

The problem is the made-up one of the tests. Where this machine allows it, the fourth worker poses as another machine
(a hostname of its own), and is killed too: the others can only notice that by the heartbeat it no longer sends.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState

from moa_search.search.tuning.loop import prepare, summarise
from moa_search.search.tuning.quiet import quiet
from tests.moa_search.search.tuning.tuning_helpers import SPACE, tuning

TRIALS, WORKERS, SECONDS = 40, 4, 0.4
PROGRAM = "tests/moa_search/search/tuning/tuning_helpers.py"
SEEDS = [SPACE.default, SPACE.of_weights([1, 0]), SPACE.of_weights([0, 1])]


def start(index: int, storage: str, folder: Path, elsewhere: bool) -> subprocess.Popen:
    command = [sys.executable, PROGRAM, str(folder), storage, str(TRIALS), str(SECONDS), str(index)]
    if elsewhere:
        command = ["unshare", "--uts", "sh", "-c", 'hostname another-machine; exec "$@"', "sh", *command]
    return subprocess.Popen(command)


def can_pose_as_other_machine() -> bool:
    probe = ["unshare", "--uts", "hostname", "probe"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def kill_at_work(worker: subprocess.Popen, study) -> int:
    """Kill a worker in the middle of a trial; the trial's number."""
    while True:
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs.get("worker", {})
            if owner.get("pid") == worker.pid and len(trial.params) == len(SPACE.ranges) + 1:
                worker.send_signal(signal.SIGKILL)
                worker.wait()
                print(f"killed process {worker.pid} on {owner['host']} in the middle of trial {trial.number}")
                return trial.number
        time.sleep(0.02)


def wait_for(finished: int, study) -> None:
    while len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < finished:
        time.sleep(0.05)


def main(storage: str, folder: Path) -> None:
    began = time.monotonic()
    shared = tuning(folder, TRIALS, storage=storage, heartbeat_seconds=2)
    study = prepare(shared, SEEDS)
    elsewhere = can_pose_as_other_machine()
    workers = [start(index, storage, folder, elsewhere and index == WORKERS - 1) for index in range(WORKERS)]
    wait_for(TRIALS // 4, study)
    killed = [kill_at_work(workers[0], study)]
    if elsewhere:
        wait_for(TRIALS // 2, study)
        killed.append(kill_at_work(workers[-1], study))
    codes = [worker.wait() for worker in workers]
    report(study, killed, codes, time.monotonic() - began)


def report(study, killed: list[int], codes: list[int], seconds: float) -> None:
    trials = study.get_trials()
    done = Counter((t.user_attrs["worker"]["host"], t.user_attrs["worker"]["pid"]) for t in trials if t.values)
    print(f"\n{TRIALS} trials asked for, {len(trials)} in the study after {seconds:.0f} s; exit codes {codes}\n")
    print("| state | trials |\n|---|---|")
    for state, count in summarise(study, SPACE).counts.items():
        print(f"| {state} | {count} |")
    print("\n| worker | trials completed |\n|---|---|")
    for (host, pid), count in sorted(done.items()):
        print(f"| {host}, process {pid} | {count} |")
    successors = {}
    with quiet():
        for trial in trials:
            for number in RetryHeartbeatStaleTrialCallback.retry_history(trial):
                successors[number] = trial
    print("\n| killed in trial | its state | tried again as | state | same parameters |\n|---|---|---|---|---|")
    for number in killed:
        again = successors[number]
        same = again.params == trials[number].params
        print(f"| {number} | {trials[number].state.name} | {again.number} | {again.state.name} | {same} |")
        assert trials[number].state == TrialState.FAIL
        assert again.state == TrialState.COMPLETE
        assert same
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.COMPLETE] == TRIALS, states
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == states[TrialState.PRUNED] == 0, states
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    surplus = [trial.number for trial in failed if "reason" in trial.user_attrs]
    assert {trial.number for trial in failed} == {*killed, *surplus}
    assert sum("seed" in trial.user_attrs and bool(trial.values) for trial in trials) == len(SEEDS)
    assert [code for code in codes if code not in (0, -signal.SIGKILL)] == []
    print(f"\nevery trial is accounted for; begun at the same moment as the last one and given up: {surplus or 'none'}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], Path(sys.argv[2]))
