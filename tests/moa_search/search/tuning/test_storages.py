"""Where studies are kept: what is understood, and what is refused in one line."""

import json
import socket
import sqlite3
import sys

import optuna
import pytest

from moa_search.errors import ConfigError
from moa_search.search.tuning import backends
from moa_search.search.tuning.storages import Location, open_storage


def parse(storage):
    return Location.parse(storage, "folder")


def refused(storage):
    with pytest.raises(ConfigError) as caught:
        open_storage(parse(str(storage)))
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestParse:
    @pytest.mark.parametrize(
        ("storage", "kind", "url"),
        [
            (None, "journal", "folder/study.journal"),
            ("/net/shared.journal", "journal", "/net/shared.journal"),
            ("sqlite:///a.db", "sqlite", "sqlite:///a.db"),
            ("postgres://moa@host/db", "postgresql", "postgresql+psycopg://moa@host/db"),
            ("postgresql://moa@host/db", "postgresql", "postgresql+psycopg://moa@host/db"),
            ("postgresql+pg8000://moa@host/db", "postgresql", "postgresql+pg8000://moa@host/db"),
        ],
    )
    def test_kinds(self, storage, kind, url):
        assert (parse(storage).kind, parse(storage).url) == (kind, url)

    def test_passwords_are_not_shown(self):
        assert "secret" not in parse("postgresql://moa:secret@host/db").shown

    @pytest.mark.parametrize(
        "storage",
        [
            "redis://host",
            "grpc://host:1",
            "mysql+pymysql://h/db",
            "postgresql://host:port/db",
            "sqlite://",
            "sqlite:///:memory:",
        ],
    )
    def test_others_are_refused(self, storage):
        with pytest.raises(ConfigError):
            parse(storage)


class TestJournal:
    @pytest.fixture
    def journal(self, tmp_path):
        path = tmp_path / "folder" / "study.journal"
        study = optuna.create_study(storage=open_storage(parse(str(path))), study_name="tune")
        study.enqueue_trial({"x": 1.0})
        return path

    def trials(self, path):
        return len(optuna.load_study(storage=open_storage(parse(str(path))), study_name="tune").get_trials())

    @pytest.mark.parametrize("content", [b"a note\n", b"[1, 2]\n", b'{"schema": "moa-plan/1"}\n', b"\x00\xff\n"])
    def test_foreign_files_are_left_alone(self, tmp_path, content):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert "isn't the journal of a study" in refused(path)
        assert path.read_bytes() == content

    def test_a_database_given_as_a_path(self, tmp_path):
        with sqlite3.connect(tmp_path / "study.db") as database:
            database.execute("create table t (x)")
        database.close()
        assert f"sqlite:///{tmp_path}/study.db" in refused(tmp_path / "study.db")

    def test_a_torn_last_line_is_cut_off(self, journal):
        whole = journal.read_bytes()
        journal.write_bytes(whole + b'{"op_code":4,"wor')
        assert self.trials(journal) == 1
        assert journal.read_bytes() == whole

    def test_damage_is_told(self, journal):
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([lines[0], b"\x00\x00\n", *lines[1:]]))
        assert "damaged" in refused(journal)
        journal.write_bytes(lines[0] + json.dumps({"op_code": 4}).encode() + b"\n")
        assert "damaged" in refused(journal)

    def test_a_lock_left_behind_is_taken_over(self, tmp_path, monkeypatch):
        """By a worker that was killed while it wrote, with the journal's path relative to the working directory."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(backends, "LOCK_SECONDS", 3)
        storage = open_storage(parse("runs/study.journal"))
        storage._backend._lock.acquire()
        optuna.create_study(storage=open_storage(parse("runs/study.journal")), study_name="tune")

    def test_a_folder_in_its_place(self, tmp_path):
        assert "can't be used as a journal" in refused(tmp_path)


class TestDatabase:
    def test_sqlite_keeps_a_study_in_its_file(self, tmp_path):
        storage = open_storage(parse(f"sqlite:///{tmp_path}/{{study}}.db"))
        optuna.create_study(storage=storage, study_name="tune")
        assert (tmp_path / "{study}.db").exists()
        storage.remove_session()
        storage.engine.dispose()

    def test_what_is_no_database(self, tmp_path):
        (tmp_path / "note.db").write_text("a note, long enough to be looked at as the header of a database " * 20)
        assert "can't be used (file is not a database)" in refused(f"sqlite:///{tmp_path}/note.db")

    def test_an_unreachable_server(self):
        pytest.importorskip("psycopg")
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            message = refused(f"postgresql://moa:secret@127.0.0.1:{port}/db")
        assert "can't be used" in message
        assert "secret" not in message

    def test_a_missing_driver(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "psycopg", None)
        assert "pip install 'moa-search[postgresql]'" in refused("postgresql://moa@127.0.0.1/db")
