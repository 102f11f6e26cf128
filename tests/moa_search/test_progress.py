"""Bars are drawn in terminals and notebooks, and nowhere else."""

import io
import os
import subprocess
import sys
import textwrap
from contextlib import redirect_stderr

import pytest

from moa_search.progress import DISABLED, no_bars, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("moa_search.progress.SHOWN_AFTER_S", 0)
    monkeypatch.delenv(DISABLED, raising=False)


def drawn(loop, screen=Terminal):
    with redirect_stderr(screen()) as shown:
        loop()
    return shown.getvalue()


def count(**options):
    assert list(progress(range(3), what="Counting", unit="sheep", **options)) == [0, 1, 2]


def test_a_terminal_shows_what_is_done():
    shown = drawn(count)
    assert "Counting: 100%" in shown
    assert "3/3" in shown
    assert "sheep" in shown


def test_loops_that_tell_what_was_done():
    def read():
        with progress(what="Reading", unit="token", total=2000) as bar:
            bar.update(1500)
            bar.update(500)

    assert "2.00k/2.00k" in drawn(read)


def test_a_bar_within_another_goes_when_it_is_done():
    def loops():
        for _ in progress(range(2), what="Outer", unit="plan"):
            for _ in progress(range(2), what="Inner", unit="token"):
                pass

    shown = drawn(loops)
    assert "Inner: " in shown
    assert shown.rstrip().rpartition("\r")[2].startswith("Outer: 100%")


def test_what_is_quick_draws_nothing(monkeypatch):
    monkeypatch.setattr("moa_search.progress.SHOWN_AFTER_S", 60)
    assert drawn(count).strip() == ""


def test_no_terminal_no_bar():
    assert drawn(count, io.StringIO) == ""


def test_bars_can_be_switched_off(monkeypatch):
    with no_bars():
        assert drawn(count) == ""
        assert os.environ[DISABLED] == "1", "processes that are started show none either"
    assert DISABLED not in os.environ
    assert drawn(lambda: count(show=False)) == ""
    monkeypatch.setenv(DISABLED, "1")
    with no_bars():
        pass
    assert drawn(count) == ""
    monkeypatch.setenv(DISABLED, "0")
    assert "Counting" in drawn(count)


def cell(code):
    """What a notebook's cell writes, in a kernel of its own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    imported = "from moa_search import progress\nprogress.SHOWN_AFTER_S = 0\n"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(imported + textwrap.dedent(code))])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    return "".join(output.get("text", "") for output in notebook.cells[0].outputs)


def test_a_notebook_shows_one_bar_and_no_advice():
    shown = cell("""
        for _ in progress.progress(range(2), what="Outer", unit="plan"):
            list(progress.progress(range(3), what="Inner", unit="token"))
    """)
    assert "Outer: 100%" in shown
    assert "Inner" not in shown, "text bars can't stand below one another there"
    assert "Warning" not in shown
    assert "\x1b" not in shown


def test_a_process_that_runs_notebooks_is_none():
    code = """
        import nbclient, ipykernel.kernelapp
        from moa_search import progress
        progress.SHOWN_AFTER_S = 0
        list(progress.progress(range(3), what="Counting", unit="sheep"))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
