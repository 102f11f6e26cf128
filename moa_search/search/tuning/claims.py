"""Who works at a trial, and what becomes of trials whose worker is gone.

A journal has no heartbeat, and a heartbeat takes minutes to be missed. So every worker writes into its trial which
process of which host it is, and whoever shares that host can see at once that the process is no more.
"""

from __future__ import annotations

import copy
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa_search.search.tuning.quiet import quiet

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

__all__ = ["CLAIM", "REASON", "RETRIES", "SEED", "Reclaimer", "claim", "requeue", "state_of"]

CLAIM = "worker"
"""User attribute of a trial: the process that works at it."""

REASON = "reason"
"""User attribute of a trial: why it has no value."""

SEED = "seed"
"""User attribute of a trial that the coordinator enqueued: its place among the seeds."""

RETRIES = 3
"""Times that a trial is tried again after its worker has gone: it may be what kills them."""

UNCLAIMED_SECONDS = 30.0
"""Time after which a running trial that says no worker counts as left behind; saying so takes milliseconds."""

RETRY_SECONDS = 5.0
"""Time that a lost trial's place is kept for its successor; the two are written one right after the other."""

PROC = Path("/proc")


def claim() -> dict[str, Any]:
    """What a worker writes into its trial: host, process id and when that process started."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), **_namespace()}


def state_of(owner: dict[str, Any]) -> Literal["alive", "dead", "elsewhere"]:
    """Whether the process of a claim lives; ``elsewhere`` where that can't be seen from here."""
    here = _namespace()
    if owner.get("host") != socket.gethostname():
        return "elsewhere"
    if owner.get("boot") != here["boot"]:
        return "dead"  # the host has started anew since
    if owner.get("namespace") != here["namespace"]:
        return "elsewhere"  # a container on the same host, whose process ids mean something else
    started = _started(int(owner["pid"]))
    return "alive" if started is not None and started == owner.get("started") else "dead"


def requeue(study: Study, trial: FrozenTrial, *, most: int | None = RETRIES) -> None:
    """Enqueue a failed trial's parameters again, at most ``most`` times in all; None sets no limit."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    if not trial.params and not trial.system_attrs.get("fixed_params"):
        return  # it ended before anything was drawn: any new trial takes its place
    again = copy.deepcopy(trial)
    # The claim and the plan are the dead worker's; the next one writes its own.
    again.user_attrs = {name: value for name, value in trial.user_attrs.items() if name == SEED}
    with quiet():
        RetryHeartbeatStaleTrialCallback(max_retry=most)(study, again)


class Reclaimer:
    """Fails trials whose worker is gone and enqueues them again."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self._unclaimed_since: dict[int, float] = {}
        self._awaited_since: dict[int, float] = {}

    def __call__(self, *, everywhere: bool = False) -> list[int]:
        """Look once.

        Args:
            everywhere: Also take trials of workers that can't be seen from here; for when none is left.

        Returns:
            Numbers of the trials that were failed.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.storages import fail_stale_trials
        from optuna.trial import TrialState

        with quiet():
            fail_stale_trials(self._study)
        taken = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if not self._is_lost(trial, everywhere):
                continue
            try:
                self._study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, UpdateFinishedTrialError):
                continue  # another process was faster, and enqueues it
            requeue(self._study, trial)
            taken.append(trial.number)
        return taken

    def awaits_successor(self) -> bool:
        """Whether another process has failed a lost trial and not enqueued it again yet: its place isn't free."""
        from optuna.trial import TrialState

        trials = self._study.get_trials(deepcopy=False)
        succeeded = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
        now = time.monotonic()
        return any(
            now - self._awaited_since.setdefault(trial.number, now) < RETRY_SECONDS
            for trial in trials
            if trial.state == TrialState.FAIL
            and REASON not in trial.user_attrs
            and trial.number not in succeeded
            and len(trial.system_attrs.get("retry_history", ())) < RETRIES
            and (trial.params or trial.system_attrs.get("fixed_params"))
        )

    def elsewhere(self) -> dict[int, str]:
        """Running trials by number whose worker can't be seen from here, with its host."""
        from optuna.trial import TrialState

        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        owners = {trial.number: trial.user_attrs.get(CLAIM) for trial in running}
        return {
            number: str(owner.get("host"))
            for number, owner in owners.items()
            if isinstance(owner, dict) and state_of(owner) == "elsewhere"
        }

    def _is_lost(self, trial: FrozenTrial, everywhere: bool) -> bool:
        owner = trial.user_attrs.get(CLAIM)
        if not isinstance(owner, dict):
            since = self._unclaimed_since.setdefault(trial.number, time.monotonic())
            return everywhere or time.monotonic() - since > UNCLAIMED_SECONDS
        state = state_of(owner)
        return state == "dead" or (everywhere and state == "elsewhere")


def _namespace() -> dict[str, str]:
    """In what the host's process ids are unique: the time since it started, and the container."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return {"boot": boot, "namespace": os.readlink(PROC / "self/ns/pid")}
    except OSError:
        return {"boot": "", "namespace": ""}


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the host did; None if it doesn't run.

    Without a ``/proc`` it is 0 for any process that runs.
    """
    if not (PROC / "self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    try:
        # The name in parentheses may hold spaces and parentheses; fields are counted after it (see proc(5)).
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
