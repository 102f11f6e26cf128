"""Tasks over texts of a user's."""

import numpy as np
import pytest

from moa_search import evaluate_model
from moa_search.data import hash_samples
from moa_search.data.frames import plain_frame
from moa_search.data.loading import load_texts
from moa_search.errors import CalibrationError, ConfigError
from moa_search.tasks import SOURCE_TASKS, parse_source, require_tasks
from moa_search.tasks.drawing import Drawing

LENGTH = 800


def words(seed, lines=500):
    numbers = np.random.default_rng(seed).integers(16**5, size=(lines, 12))
    return "\n".join(" ".join(f"{number:05x}" for number in line) for line in numbers)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(words(0))
    return path


def drawn(tiny_model, typed, **changes):
    (task,) = require_tasks([typed])
    return task.held_out(tiny_model[1], **{"length": LENGTH, "count": 4, "seed": 0, **changes})


@pytest.mark.parametrize("kind", SOURCE_TASKS)
def test_items_are_those_of_the_calibration_source_on_the_other_side_of_the_file(kind, book, tiny_model):
    """One builder: the source's own held-out questions are the same tokens."""
    items = drawn(tiny_model, f"{kind}:{book}")
    assert hash_samples(items) == hash_samples(drawn(tiny_model, f"nll:{kind}:{book}"))
    assert {item.task for item in items} == {kind}
    source = parse_source(f"{kind}:{book}")
    calibration = Drawing(
        tiny_model[1], [source], lengths=[LENGTH], count=4, seed=0, split="calibration",
        frame=plain_frame(tiny_model[1]), free_room=None,
    )  # fmt: skip
    used = {item.document for item in calibration.round(LENGTH, 0)[source.typed]}
    assert used.isdisjoint(item.document for item in items)


@pytest.mark.parametrize("kind", ["passkey", "copy", "turns", "perplexity"])
def test_every_word_of_the_filler_is_held_out(kind, book, tiny_model):
    sides = {side: {w for _, text in load_texts(parse_source(f"copy:{book}"), side) for w in text.split()}
             for side in ("calibration", "validation", "test")}  # fmt: skip
    others = (sides["calibration"] | sides["validation"]) - sides["test"]
    found = {word for item in drawn(tiny_model, f"{kind}:{book}") for word in tiny_model[1].decode(item.ids).split()}
    assert len(found & sides["test"]) > 100
    assert not found & others


def test_depths_are_those_asked_for(book, tiny_model):
    items = drawn(tiny_model, f"passkey:{book}", depths=[0.0, 1.0], count=2)
    assert [item.depth for item in items] == [0, 1, 0, 1]


class TestNames:
    def test_files_of_one_name_keep_their_folders(self, book, tmp_path):
        other = tmp_path / "book.txt"
        other.write_text(words(1))
        names = [task.name for task in require_tasks([f"passkey:{book}", f"copy:{other}", f"copy:{book}", "copy"])]
        assert names == [f"passkey:{book}", f"copy:{other}", f"copy:{book}", "copy"]
        names = [task.name for task in require_tasks([f"passkey:{book}", f"copy:{book}", f"nll:copy:{book}"])]
        assert names == ["passkey:book.txt", "copy:book.txt", "nll:copy:book.txt"]

    def test_a_file_written_in_two_ways_is_one(self, book, monkeypatch):
        monkeypatch.chdir(book.parent)
        names = [task.name for task in require_tasks([f"passkey:{book}", "passkey:book.txt", "copy:./book.txt"])]
        assert names == ["passkey:book.txt", "copy:book.txt"]

    def test_folders_patterns_and_columns(self, book, tmp_path, monkeypatch):
        (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"body": "{words(n, 1)}"}}' for n in range(30)))
        monkeypatch.chdir(book.parent)
        typed = ["copy:.", f"copy:{book.parent}/*.txt", "copy:./book.txt", f"copy:{tmp_path}/rows.jsonl?text=body"]
        names = [task.name for task in require_tasks(typed)]
        assert names == [f"copy:{book.parent.name}", typed[1], "copy:book.txt", "copy:rows.jsonl?text=body"]

    def test_scores_are_reported_under_them(self, book, tiny_model):
        typed = [f"passkey:{book}", f"copy:{book}", f"nll:passkey:{book}"]
        items = evaluate_model(tiny_model, tasks=typed, lengths=[400], samples=2, baselines=["dense"])
        metrics = dict(zip(items["task"], items["metric"], strict=True))
        assert metrics == {
            "passkey:book.txt": "exact match",
            "copy:book.txt": "token accuracy",
            "nll:passkey:book.txt": "token accuracy",
        }


class TestRefusals:
    """Told before a model is loaded, in one line."""

    @pytest.mark.parametrize(
        ("typed", "message"),
        [
            ("passkey:{}/missing.txt", "source 'passkey:.*missing.txt' can't be read: .*missing.txt doesn't exist"),
            ("nll:passkey:{}/missing.txt", "missing.txt doesn't exist"),
            ("nll:{}/one.txt", "text files hold no questions; passkey:.*one.txt hides one"),
            ("copy:{}/binary.txt", "binary.txt, line 1: byte 0xff is not UTF-8"),
            ("lines:{}/program", "a file without ending is not one of .jsonl"),
            (
                "turns:{}/one.txt",
                "has 1 documents, none of them for test; give more of them .a text file counts as one",
            ),
            ("perplexity:{}/one.txt?colour=red", "key 'colour' is unknown; choose from subset, split, text"),
            ("paskey:{}/one.txt", r"did you mean 'passkey'.*passkey:FILE and so on over texts of yours"),
            ("ruler:niah_single_1:{}/one.txt", "RULER has no such task"),
        ],
    )
    def test_data_that_cannot_be_used(self, typed, message, tmp_path):
        (tmp_path / "one.txt").write_text("Only a few words, which calibration takes. " * 8)
        (tmp_path / "binary.txt").write_bytes(b"\xff\x07 not text")
        (tmp_path / "program").write_bytes(b"\x7fELF")
        with pytest.raises((ConfigError, CalibrationError), match=message) as caught:
            evaluate_model("no/such/model", tasks=[typed.format(tmp_path)], baselines=["dense"])
        assert "\n" not in str(caught.value)

    def test_less_held_out_text_than_an_item_needs(self, book, tiny_model):
        with pytest.raises(CalibrationError, match=r"the held-out texts of passkey:book.txt have \d+; give more text"):
            drawn(tiny_model, f"passkey:{book}", length=40_000, count=1)
