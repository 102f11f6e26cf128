"""Running commands as a user runs them."""

import sys

import pytest

from moa_search import api


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run a command's entry point under its name; returns exit status, output and errors."""

    def run(main, program, *arguments):
        monkeypatch.setattr(sys, "argv", [*program.split(), *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def profiled(tmp_path_factory, tiny_model_dir):
    """A profile of the tiny model, made once."""
    path = tmp_path_factory.mktemp("profile") / "profile.safetensors"
    api.profile_model(
        str(tiny_model_dir), lengths=[300, 600], samples=2, answers="dataset", output=str(path), dtype="float32"
    )
    return path
