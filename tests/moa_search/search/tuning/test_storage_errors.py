"""What goes wrong with a storage while a study is under way: one line, nothing torn, and the study can be resumed."""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moa_search.errors import ConfigError, TuningError
from moa_search.search.tuning import storages
from moa_search.search.tuning.loop import tune, tune_in_parallel
from tests.moa_search.search.tuning import tuning_helpers
from tests.moa_search.search.tuning.tuning_helpers import SPACE, decode, true_loss, tuning

SEEDS = [SPACE.default, SPACE.of_weights([1, 0])]
KINDS = {"journal": "{}/study.journal", "sqlite": "sqlite:///{}/study.db"}


@pytest.fixture(params=KINDS)
def shared(request, tmp_path):
    return tuning(tmp_path, 8, storage=KINDS[request.param].format(tmp_path))


@pytest.fixture
def journal(tmp_path):
    return tuning(tmp_path, 8, storage=KINDS["journal"].format(tmp_path))


@pytest.fixture
def database(tmp_path):
    return tuning(tmp_path, 8, storage=KINDS["sqlite"].format(tmp_path))


def interfering(shared, act, at=3):
    """True losses; once, when trial number ``at`` runs, something happens to the file."""
    calls = iter(range(10**6))

    def evaluate(plan):
        if next(calls) == at:
            act(shared.location.path)
        return true_loss(plan)

    return evaluate


def stopped(shared, act, error=TuningError):
    """The one line that a study ends with when ``act`` is done to its file under way."""
    with pytest.raises(error) as caught:
        tune(shared, decode, interfering(shared, act), SEEDS)
    message = str(caught.value)
    assert "\n" not in message
    assert str(shared.location.path) in message
    return message


def resumes(shared):
    summary = tune(shared, decode, true_loss, SEEDS)
    assert summary.counts["COMPLETE"] >= shared.trials
    assert summary.counts["RUNNING"] == 0
    return summary


class Held:
    """Another process's lock on an SQLite file, for some seconds."""

    def __init__(self, seconds):
        self._seconds = seconds

    def __call__(self, path):
        begun = threading.Event()

        def hold():
            other = sqlite3.connect(path)
            other.execute("begin exclusive")
            begun.set()
            time.sleep(self._seconds)
            other.rollback()
            other.close()

        self._thread = threading.Thread(target=hold)
        self._thread.start()
        begun.wait()

    def wait(self):
        self._thread.join()


class TestLocked:
    def test_a_lock_that_ends_is_waited_for(self, database):
        held = Held(1.5)
        summary = tune(database, decode, interfering(database, held), SEEDS)
        held.wait()
        assert summary.counts["COMPLETE"] == 8

    def test_one_that_does_not_is_told(self, database, monkeypatch):
        monkeypatch.setattr(storages, "BUSY_SECONDS", 0.2)
        held = Held(3)
        assert "database is locked" in stopped(database, held)
        held.wait()
        resumes(database)

    def test_a_journal_whose_lock_cannot_be_made(self, journal, monkeypatch):
        def act(path):
            monkeypatch.setattr(os, "symlink", refuse)

        def refuse(*_):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        assert "Read-only file system" in stopped(journal, act)
        monkeypatch.undo()
        resumes(journal)


class TestGone:
    def test_a_removed_file_is_not_made_anew(self, shared, tmp_path):
        kept = tmp_path / "kept"
        stopped(shared, lambda path: shutil.move(path, kept))
        shutil.move(kept, shared.location.path)
        assert resumes(shared).counts["FAIL"] <= 1

    def test_a_replaced_journal_is_told(self, journal):
        def act(path):
            content = path.read_bytes()
            path.rename(path.with_suffix(".old"))
            path.write_bytes(content)

        assert "replaced" in stopped(journal, act)
        resumes(journal)

    def test_a_removed_folder(self, tmp_path):
        shared = tuning(tmp_path, 8, storage=f"{tmp_path}/there/study.journal")
        assert "removed" in stopped(shared, lambda path: shutil.rmtree(path.parent))


class TestFull:
    LIMITED = """
import resource, signal, sys
from pathlib import Path
from tests.moa_search.search.tuning.test_storage_errors import SEEDS, decode, interfering, tune, tuning

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def fill(path):
    size = path.stat().st_size + int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
shared = tuning(Path(sys.argv[1]), 40, storage=sys.argv[2])
tune(shared, decode, interfering(shared, fill), SEEDS)
"""

    @pytest.mark.parametrize("room", [0, 100, 1000])
    def test_a_disk_that_fills_up(self, shared, tmp_path, room):
        """A limit on the size of files stands for the disk: the same short writes, another number of the error."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", self.LIMITED, str(tmp_path), shared.storage, str(room)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "TuningError" in done.stderr.splitlines()[-1], done.stderr
        if shared.location.kind == "journal":
            assert shared.location.path.read_bytes().endswith(b"\n"), "no half line is left"
        resumes(shared)


class TestReadOnly:
    """As a mount that the system made read-only, root included."""

    @pytest.mark.parametrize("what", ["file", "folder"])
    def test_it_turns_read_only(self, shared, what):
        def set_immutable(sign):
            path = shared.location.path
            command = ["chattr", f"{sign}i", path if what == "file" else path.parent]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0

        def act(path):
            if not set_immutable("+"):
                pytest.skip("needs root, and a file system that knows immutable files")

        try:
            stopped(shared, act)
        finally:
            set_immutable("-")
        resumes(shared)


class TestDamaged:
    @pytest.mark.parametrize("garbage", [b"\x00\xff\n{}\n", b"{}\nnot json\n[1]\n"])
    def test_a_journal(self, journal, garbage):
        def act(path):
            with path.open("ab") as file:
                file.write(garbage)

        before = stopped(journal, act)
        assert "isn't a journal's" in before
        with pytest.raises(ConfigError, match="damaged"):
            resumes(journal)

    def test_a_database(self, database):
        def act(path):
            with path.open("r+b") as file:
                file.write(b"\x00" * path.stat().st_size)

        assert "not a database" in stopped(database, act)

    def test_tables_that_were_dropped(self, database):
        def act(path):
            with sqlite3.connect(path) as other:
                other.execute("drop table trial_values")
            other.close()

        assert "no such table" in stopped(database, act)


def test_workers_that_lose_their_journal_end_with_one_line_each(tmp_path, capfd):
    shared = tuning(tmp_path, 40, workers=2)

    def remove():
        while not any(tmp_path.glob("worker-*")):
            time.sleep(0.05)
        time.sleep(2)
        shutil.move(tmp_path / "study.journal", tmp_path / "kept")

    threading.Thread(target=remove).start()
    with pytest.raises(TuningError) as caught:
        tune_in_parallel(shared, tuning_helpers.worker, [0.2], SEEDS)
    assert "removed" in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    shutil.move(tmp_path / "kept", tmp_path / "study.journal")
    resumes(tuning(tmp_path, 10))


def test_disk_errors_of_an_evaluation_are_not_the_studys(journal):
    def full(plan):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(Path("elsewhere")))

    with pytest.raises(OSError, match="elsewhere"):
        tune(journal, decode, full, SEEDS)
    resumes(journal)
