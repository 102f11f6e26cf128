"""Draws follow from their arguments alone, whatever the process, its locale or the folder they are made in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRAW = """
import sys
from moa_search.calibration import calibrate
from moa_search.data import hash_samples
from tests.moa_search.bytewise import TEMPLATE, make_chat_tokenizer
tokenizer = make_chat_tokenizer("{{ strftime_now('%A %x %p') }}" + TEMPLATE)
sources = ["passkey", "copy", "multikey", "question", "passkey:books", "rows"]
made = calibrate(None, tokenizer, sources=sources, lengths=[900], samples=12, seed=3, answers="dataset")
print(hash_samples(made.samples), made.settings["data"]["rows"], made.settings["data"]["passkey:books"])
"""


def draw_in(folder, **environment):
    root = Path(__file__).parents[3]
    paths = os.pathsep.join([str(root), str(root / "kernels")])
    run = subprocess.run(
        [sys.executable, "-c", DRAW],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not run.returncode, run.stderr
    return run.stdout


def fill(folder, order, records):
    (folder / "books").mkdir(parents=True)
    (folder / "rows").mkdir()
    for name in order:
        lines = (f"{name} says line {i}, naïve as ever, of many lines in a book\n" for i in range(700))
        (folder / "books" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        mine = records[ord(name) - ord("a") :: 3]
        (folder / "rows" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, mine)))
    return folder


@pytest.mark.slow
def test_equal_arguments_give_equal_draws_in_any_process(tmp_path, records):
    usual = draw_in(fill(tmp_path / "one", "abc", records), PYTHONHASHSEED="0")
    other = {
        "PYTHONHASHSEED": "7",
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONIOENCODING": "",
    }
    assert draw_in(fill(tmp_path / "two", "cba", records), **other, OMP_NUM_THREADS="1") == usual


def test_the_order_in_which_a_folder_lists_its_files_does_not_matter(tmp_path, records, monkeypatch):
    from moa_search.data.loading import load_records, load_texts
    from moa_search.tasks import parse_source

    folder = fill(tmp_path / "one", "abc", records)
    sources = [(load_texts, "passkey:{}/books"), (load_texts, "passkey:{}/books/*"), (load_texts, "passkey:{}/rows")]
    sources += [(load_texts, "passkey:{}/rows/*.jsonl")]

    def load():
        return [
            *(load(parse_source(typed.format(folder)), "test") for load, typed in sources),
            load_records(parse_source(f"records:{folder}/rows"), "test", answers=True),
        ]

    usual = load()
    listed, rglob = os.scandir, Path.rglob

    class Reversed:
        def __init__(self, path):
            with listed(path) as entries:
                self.entries = iter(list(entries)[::-1])

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        close = __exit__

    monkeypatch.setattr("os.scandir", Reversed)
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: iter(list(rglob(path, pattern))[::-1]))
    assert [path.name for path in (folder / "books").rglob("*")] != sorted(
        path.name for path in (folder / "books").iterdir()
    )
    assert load() == usual
