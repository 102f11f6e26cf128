"""Optuna's storages, made to fail in one way: whatever goes wrong is a `StorageInternalError`, and nothing is torn."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.exc import SQLAlchemyError

LOCK_SECONDS = 30
"""Time after which the journal's lock counts as left behind by a worker that was killed while it wrote."""


class Journal(JournalFileBackend):
    """A journal file that is never torn, and never made anew while a study is under way.

    Args:
        path: Absolute, since the lock is a link to the journal: were that link relative to its own folder, Optuna
            would wait forever for the lock of a worker that was killed while it wrote.
    """

    def __init__(self, path: str) -> None:
        self._mutex = JournalFileSymlinkLock(path, grace_period=LOCK_SECONDS)
        super().__init__(path, lock_obj=self._mutex)
        self._path, self._identity = path, _identity(path)
        self._repair()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Operations from a number on."""
        with self._errors():
            yield from super().read_logs(log_number_from)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append operations, all or none: a full disk leaves no half line for other workers to write after."""
        lines = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs).encode()
        with self._errors(), self._locked(), open(self._path, "r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                rest = memoryview(lines)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def _repair(self) -> None:
        """Cut off a last line that was torn when the host crashed."""
        with self._locked(), open(self._path, "r+b") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._mutex.acquire()
        try:
            yield
        finally:
            self._mutex.release()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            if _identity(self._path) != self._identity:
                raise StorageInternalError("the file was replaced while the study was under way")
            yield
        except FileNotFoundError:
            raise StorageInternalError("the file was removed while the study was under way") from None
        except OSError as error:
            raise StorageInternalError(error.strerror or str(error)) from error
        except ValueError as error:
            raise StorageInternalError(f"a line in it isn't a journal's: {error}") from error
        except RuntimeError as error:  # of the lock
            if isinstance(error, StorageInternalError):
                raise
            raise StorageInternalError(f"its lock was lost: {error}") from error


class Database(RDBStorage):
    """A database in which a missed sign of life is no error: the next thing that a worker writes tells."""

    def record_heartbeat(self, trial_id: int) -> None:
        """Note that a trial's worker is alive; called in a thread of its own."""
        with suppress(StorageInternalError, SQLAlchemyError):
            super().record_heartbeat(trial_id)


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino
