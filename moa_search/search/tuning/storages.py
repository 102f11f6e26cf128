"""Where studies are kept: a journal file, an SQL database, or a gRPC server in front of one."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moa_search.errors import ConfigError
from moa_search.formats.files import one_line
from moa_search.search.tuning.claims import requeue
from moa_search.search.tuning.quiet import quiet

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

__all__ = ["HEARTBEAT_SECONDS", "JOURNAL", "Location", "open_storage", "serve_study"]

JOURNAL = "study.journal"
"""Name of the journal in the study's folder."""

HEARTBEAT_SECONDS = 60
"""Time between two signs of life in a database; a worker that misses two is taken for dead."""

LOCK_SECONDS = 30
"""Time after which the journal's lock counts as left behind by a worker that was killed while it wrote."""

CONNECT_SECONDS = 10
GRPC_MODULES = {"grpc": "grpcio", "google": "protobuf"}


@dataclass(frozen=True)
class Location:
    """A parsed ``--storage``.

    Attributes:
        kind: What keeps the study.
        url: As Optuna takes it: a path for a journal, else a URL.
        shown: For messages, without a password.
    """

    kind: Literal["journal", "sqlite", "database", "grpc"]
    url: str
    shown: str

    @classmethod
    def parse(cls, storage: str | None, folder: str | os.PathLike[str]) -> Location:
        """Where ``storage`` is; None is the journal in ``folder``.

        Raises:
            ConfigError: It is no path and no URL of a kind that can be used.
        """
        if storage is None:
            path = str(Path(folder) / JOURNAL)
            return cls("journal", path, path)
        if "://" not in storage:
            return cls("journal", storage, storage)
        scheme, rest = storage.split("://", 1)
        if scheme == "grpc":
            host, _, port = rest.rpartition(":")
            if not host or not port.isdecimal():
                raise ConfigError(f"storage {storage}: a gRPC server is given as grpc://HOST:PORT")
            return cls("grpc", rest, storage)
        dialect = scheme.partition("+")[0]
        if dialect in ("postgres", "postgresql"):
            # SQLAlchemy's default driver is psycopg2; ours is its successor.
            driver = scheme.partition("+")[2] or "psycopg"
            storage = f"postgresql+{driver}://{rest}"
        elif dialect not in ("sqlite", "mysql", "mariadb"):
            raise ConfigError(
                f"storage {scheme}://...: give the path of a journal, sqlite:///PATH, postgresql://USER@HOST/DATABASE, "
                "mysql+DRIVER://... or grpc://HOST:PORT"
            )
        return cls("sqlite" if dialect == "sqlite" else "database", storage, _without_password(storage))


def open_storage(location: Location, *, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> BaseStorage:
    """Open a storage, made on first use.

    Raises:
        ConfigError: It can't be reached, lacks a driver, or is something else.
    """
    with quiet():
        if location.kind == "journal":
            return _journal(location)
        if location.kind == "grpc":
            return _grpc_client(location)
        return _database(location, heartbeat_seconds)


def serve_study(storage: str, port: int, *, host: str = "localhost") -> None:
    """Serve a database to workers that then take ``grpc://HOST:PORT`` as their storage; runs until interrupted.

    The connection is neither encrypted nor authenticated: anyone who reaches the port can change the study.

    Args:
        storage: URL of a PostgreSQL or MySQL database.
        port: Port to listen at.
        host: Address to listen at.

    Raises:
        ConfigError: The storage isn't such a database or can't be reached, or the port can't be had.
    """
    location = Location.parse(storage, ".")
    reasons = {
        "journal": "a journal knows workers by their thread, and the server's threads serve any worker",
        "sqlite": "SQLite lets two of the server's threads claim the same trial",
        "grpc": "it already is a gRPC server",
    }
    if location.kind in reasons:
        raise ConfigError(
            f"{location.shown} can't be served over gRPC: {reasons[location.kind]}; use PostgreSQL or MySQL"
        )
    _require_grpc()
    from optuna.storages import get_storage, run_grpc_proxy_server

    database = get_storage(open_storage(location))  # adds a cache
    try:
        with quiet():
            run_grpc_proxy_server(database, host=host, port=port)
    except RuntimeError as error:
        raise ConfigError(f"{host}:{port}: can't be listened at ({_first_line(error)})") from None


def _journal(location: Location) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    # Absolute, since the lock is a link to the journal: were that link relative to its own folder, Optuna would
    # wait for ever for the lock of a worker that was killed while it wrote.
    path = Path(location.url).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            _check_journal(path)
        lock = JournalFileSymlinkLock(str(path), grace_period=LOCK_SECONDS)
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except OSError as error:
        raise ConfigError(f"{path}: can't be used as a journal ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: the journal is damaged ({_first_line(error)}); restore it, or start anew") from None


def _check_journal(path: Path) -> None:
    """Refuse what isn't a journal, and cut off a last line that was torn (a full disk, a crashed host)."""
    from optuna.storages.journal import JournalFileSymlinkLock

    with path.open("rb") as file:
        first = file.readline(1 << 20)
    try:
        operation = json.loads(first)
    except ValueError:
        operation = None
    if not isinstance(operation, dict) or "op_code" not in operation:
        hint = f"; for a database write sqlite:///{path}" if first.startswith(b"SQLite format 3") else ""
        raise ConfigError(f"{path}: isn't the journal of a study{hint}")
    lock = JournalFileSymlinkLock(str(path), grace_period=LOCK_SECONDS)
    lock.acquire()  # who appends holds it, so a line that is torn now stays so
    try:
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def _database(location: Location, heartbeat_seconds: int) -> BaseStorage:
    from optuna.exceptions import OptunaError
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    postgresql = location.url.startswith("postgresql")
    options = {"pool_pre_ping": True, "connect_args": {"connect_timeout": CONNECT_SECONDS}} if postgresql else {}
    try:
        return RDBStorage(
            location.url.replace("{", "{{").replace("}", "}}"),  # Optuna fills in a schema version
            engine_kwargs=options,
            heartbeat_interval=heartbeat_seconds,
            heartbeat_stale_trial_callback=requeue,
        )
    except ImportError:
        install = "pip install 'moa-search[postgresql]'" if postgresql else "install the one named in the URL"
        raise ConfigError(f"{location.shown}: the database driver is missing; {install}") from None
    except SQLAlchemyError as error:
        reason = _first_line(getattr(error, "orig", None) or error)
        raise ConfigError(f"{location.shown}: the database can't be used ({reason})") from None
    except (OptunaError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{location.shown}: the database can't be used ({_first_line(error)})") from None


def _grpc_client(location: Location) -> BaseStorage:
    _require_grpc()
    from optuna.storages import GrpcStorageProxy

    host, _, port = location.url.rpartition(":")
    storage = GrpcStorageProxy(host=host, port=int(port))
    try:
        storage.wait_server_ready(timeout=CONNECT_SECONDS)
    except ConnectionError:
        storage.close()
        raise ConfigError(f"{location.shown}: no server answers within {CONNECT_SECONDS} seconds") from None
    return storage


def _require_grpc() -> None:
    missing = [package for module, package in GRPC_MODULES.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f"a gRPC storage needs {' and '.join(missing)}; pip install {' '.join(missing)}")


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        raise ConfigError(f"storage {url.partition('://')[0]}://...: isn't a URL that SQLAlchemy understands") from None


def _first_line(error: BaseException) -> str:
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0])
