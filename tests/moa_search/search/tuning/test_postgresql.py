"""A study that several machines share in PostgreSQL: a real server, processes that are killed, a server that goes.

Needs ``pip install 'moa-search[postgresql]'`` and PostgreSQL's programs; skipped without them.
"""

import contextlib
import gc
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from moa_search.errors import ConfigError, TuningError
from moa_search.search.tuning.loop import tune
from moa_search.search.tuning.storages import Location, open_storage
from tests.moa_search.search.tuning import tuning_helpers
from tests.moa_search.search.tuning.tuning_helpers import SPACE, decode, true_loss, tuning

pytest.importorskip("psycopg")
PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
if PROGRAMS is None and (found := shutil.which("initdb")):
    PROGRAMS = Path(found).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAMS is None or not (PROGRAMS / "initdb").exists(), reason="needs PostgreSQL's programs"),
]

SEEDS = [SPACE.default, SPACE.of_weights([1, 0]), SPACE.of_weights([0, 1])]
HEARTBEAT = 1
"""Seconds; a worker that misses two is taken for dead."""


@pytest.fixture(autouse=True)
def _connections_are_closed(monkeypatch):
    """Optuna leaves them to the garbage collector, which would warn of each."""
    monkeypatch.delattr("psycopg._connection_base.BaseConnection.__del__")
    yield
    gc.collect()


class Server:
    """A PostgreSQL server of our own."""

    def __init__(self, folder):
        self.folder, self.password = folder, secrets.token_hex(8)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        folder.mkdir(mode=0o755)
        (folder / "password").write_text(self.password)
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres")
        self._run(
            "initdb", "--pgdata", folder / "data", "--username", "moa", "--pwfile", folder / "password",
            "--auth", "scram-sha-256", "--no-sync",
        )  # fmt: skip

    @property
    def url(self):
        return f"postgresql://moa:{self.password}@127.0.0.1:{self.port}/postgres"

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c fsync=off -k {self.folder}"
        self._run(
            "pg_ctl", "--pgdata", self.folder / "data", "--log", self.folder / "log", "--wait", "--silent",
            "--options", options, "start",
        )  # fmt: skip

    def stop(self):
        self._run("pg_ctl", "--pgdata", self.folder / "data", "--mode", "immediate", "--silent", "--wait", "stop")

    def _run(self, program, *arguments):
        as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # it refuses to run as root
        command = [*as_user, PROGRAMS / program, *arguments]
        subprocess.run(command, check=True, cwd=self.folder, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def server():
    import tempfile

    folder = Path(tempfile.mkdtemp(dir="/tmp")) / "server"
    folder.parent.chmod(0o755)
    server = Server(folder)
    server.start()
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop()
    shutil.rmtree(folder.parent)


def start(folder, server, trials, index):
    """A worker of another machine, with a folder of its own."""
    arguments = [str(folder / str(index)), server.url, str(trials), "0.3", str(index)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, tuning_helpers.__file__, *arguments], env=environment, stderr=subprocess.DEVNULL
    )


def test_machines_share_a_study_and_killed_ones_lose_nothing(server, tmp_path):
    shared = tuning(tmp_path, 16, storage=server.url, heartbeat_seconds=HEARTBEAT)
    study = shared.open()
    workers = [start(tmp_path, server, 16, index) for index in range(4)]
    deadline = time.monotonic() + 60
    for worker in workers[:2]:
        while not any(trial.params for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)  # Optuna misses only heartbeats that began, some milliseconds after the trial
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    for worker in workers[2:]:
        assert worker.wait(timeout=90) == 0
    time.sleep(2 * HEARTBEAT + 0.5)
    summary = tune(tuning(tmp_path, 20, storage=server.url, heartbeat_seconds=HEARTBEAT), decode, true_loss, SEEDS)
    assert summary.counts["RUNNING"] == 0, "heartbeats were missed"
    assert 20 <= summary.counts["COMPLETE"] <= 21
    assert summary.seeds_best == min(true_loss(decode(seed)) for seed in SEEDS)
    trials = study.get_trials()
    lost = [trial for trial in trials if trial.state == TrialState.FAIL]
    for trial in lost:
        (again,) = [other for other in trials if trial.number in other.system_attrs.get("retry_history", [])]
        assert again.params == trial.params or not trial.params


def test_a_server_that_goes_is_one_line_and_the_study_is_resumed(server, tmp_path, capfd):
    shared = tuning(tmp_path, 8, storage=server.url, name="goes", heartbeat_seconds=HEARTBEAT)
    calls = iter(range(100))

    def evaluate(plan):
        if next(calls) == 3:
            server.stop()
            time.sleep(1.5 * HEARTBEAT)  # a heartbeat is missed meanwhile
        return true_loss(plan)

    with pytest.raises(TuningError, match="can't be read or written any more") as caught:
        tune(shared, decode, evaluate, SEEDS)
    assert server.password not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    with pytest.raises(ConfigError, match="can't be used"):
        tune(shared, decode, true_loss, SEEDS)
    server.start()
    time.sleep(2 * HEARTBEAT + 0.5)
    summary = tune(shared, decode, true_loss, SEEDS)
    assert summary.counts["COMPLETE"] == 8
    assert summary.seeds_best == min(true_loss(decode(seed)) for seed in SEEDS)


def test_a_wrong_password_and_a_database_that_is_not_there(server):
    for url in (server.url.replace(server.password, "wrong"), server.url.replace("/postgres", "/nosuch")):
        with pytest.raises(ConfigError, match="can't be used") as caught:
            open_storage(Location.parse(url, "."))
        assert "wrong" not in str(caught.value)
        assert "\n" not in str(caught.value)
