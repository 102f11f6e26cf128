"""Where studies are kept: a journal or SQLite file for one machine, a PostgreSQL database for many."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moa_search.errors import ConfigError, MoAError, TuningError
from moa_search.formats.files import one_line
from moa_search.search.tuning.quiet import quiet

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "study.journal"
"""Name of the journal in the study's folder."""

HEARTBEAT_SECONDS = 60
"""Time between two signs of life in a database; a worker that misses two is taken for dead."""

RETRIES = 3
"""Times that a trial is tried again after its worker has gone: it may be what kills them."""

BUSY_SECONDS = 60
"""Time to wait for whoever has locked an SQLite file."""

CONNECT_SECONDS = 10


@dataclass(frozen=True)
class Location:
    """A parsed ``--storage``.

    Attributes:
        kind: What keeps the study.
        url: As Optuna takes it: a path for a journal, else a URL.
        shown: For messages, without a password.
        path: The file, of a journal or SQLite.
    """

    kind: Literal["journal", "sqlite", "postgresql"]
    url: str
    shown: str
    path: Path | None = None

    @classmethod
    def parse(cls, storage: str | None, folder: str | os.PathLike[str]) -> Location:
        """Where ``storage`` is; None is the journal in ``folder``.

        Raises:
            ConfigError: It is no path and no URL of a kind that can be used.
        """
        if storage is None or "://" not in storage:
            path = Path(folder) / JOURNAL if storage is None else Path(storage)
            return cls("journal", str(path), str(path), path.absolute())
        scheme, rest = storage.split("://", 1)
        dialect, _, driver = scheme.partition("+")
        if dialect in ("postgres", "postgresql"):
            # SQLAlchemy's default driver is psycopg2; ours is its successor.
            url = f"postgresql+{driver or 'psycopg'}://{rest}"
            return cls("postgresql", url, _parsed(url)[0])
        if dialect != "sqlite":
            raise ConfigError(
                f"storage {scheme}://...: give the path of a journal, sqlite:///PATH or postgresql://USER@HOST/DATABASE"
            )
        shown, database = _parsed(storage)
        if not database or database == ":memory:":
            raise ConfigError(f"storage {shown}: names no file, so the study would be lost; give sqlite:///PATH")
        return cls("sqlite", storage, shown, Path(database).absolute())

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other commands from a study's file; the system lets go of it when this process ends, however it does.

        A database isn't kept from anyone: there, heartbeats tell which workers are alive.

        Raises:
            ConfigError: Another command is at the study, or the file can't be opened.
        """
        try:
            import fcntl
        except ImportError:  # Windows has no such lock; two commands at one study aren't noticed there
            yield
            return
        if self.path is None:
            yield
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(f"{self.shown}: can't be opened ({error.strerror or error})") from None
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ConfigError(
                        f"{self.shown}: another command is at this study; wait for it, or start one with more --workers"
                    ) from None
                raise ConfigError(
                    f"{self.shown}: can't be locked ({error.strerror}); put it on a local disk, or use PostgreSQL"
                ) from None
            yield
        finally:
            os.close(handle)


@contextmanager
def storage_errors(location: Location) -> Iterator[None]:
    """Turn what a storage raises after it was opened into one line.

    Raises:
        TuningError: The study can't be read or written any more: locked, removed, damaged, a full disk, a server
            that is gone. It stands as it was last written.
    """
    try:
        yield
    except MoAError:
        raise
    except Exception as error:
        found = _storage_error(error)
        if found is None:
            raise
        raise TuningError(
            f"{location.shown}: the study can't be read or written any more ({_reason(found)}); it stands as it was "
            "last written, and the same command resumes it"
        ) from error


def open_storage(location: Location, *, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> BaseStorage:
    """Open a storage, made on first use.

    Raises:
        ConfigError: It can't be reached, lacks a driver, or is something else.
    """
    with quiet():
        if location.kind == "journal":
            return _journal(location)
        return _database(location, heartbeat_seconds)


def _journal(location: Location) -> BaseStorage:
    from optuna.exceptions import StorageInternalError
    from optuna.storages import JournalStorage

    from moa_search.search.tuning.backends import Journal

    path = location.path
    assert path is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            _require_journal(path)
        return JournalStorage(Journal(str(path)))
    except OSError as error:
        raise ConfigError(f"{path}: can't be used as a journal ({error.strerror or error})") from None
    except (StorageInternalError, ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: the journal is damaged ({_reason(error)}); restore it, or start anew") from None


def _require_journal(path: Path) -> None:
    """Refuse what isn't a journal."""
    with path.open("rb") as file:
        first = file.readline(1 << 20)
    try:
        operation = json.loads(first)
    except ValueError:
        operation = None
    if not isinstance(operation, dict) or "op_code" not in operation:
        hint = f"; for a database write sqlite:///{path}" if first.startswith(b"SQLite format 3") else ""
        raise ConfigError(f"{path}: isn't the journal of a study{hint}")


def _database(location: Location, heartbeat_seconds: int) -> BaseStorage:
    from optuna.exceptions import OptunaError
    from optuna.storages import RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    from moa_search.search.tuning.backends import Database

    url = location.url.replace("{", "{{").replace("}", "}}")  # Optuna fills in a schema version
    try:
        if location.kind == "sqlite":
            return Database(url, engine_kwargs={"connect_args": {"timeout": BUSY_SECONDS}})
        return Database(
            url,
            engine_kwargs={"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}},
            heartbeat_interval=heartbeat_seconds,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
        )
    except ImportError:
        install = "pip install 'moa-search[postgresql]'"
        raise ConfigError(f"{location.shown}: the database driver is missing; {install}") from None
    except (SQLAlchemyError, OptunaError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{location.shown}: the database can't be used ({_reason(error)})") from None


def _parsed(url: str) -> tuple[str, str | None]:
    """A URL without its password, and the database that it names."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(f"storage {url.partition('://')[0]}://...: isn't a URL that SQLAlchemy understands") from None
    return parsed.render_as_string(hide_password=True), parsed.database


def _storage_error(error: BaseException | None) -> Exception | None:
    """The storage's error that led to ``error``; Optuna 5.0 follows a second one with an UnboundLocalError."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    while error is not None:
        if isinstance(error, StorageInternalError | SQLAlchemyError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException) -> str:
    """The first line of what the driver or the system said."""
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error.__cause__, SQLAlchemyError):
        error = error.__cause__
    error = getattr(error, "orig", None) or error
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])
