"""Samples saved and read again."""

import json

import datasets
import numpy as np
import pytest

from moa_search.data import Sample, load_samples, save_samples
from moa_search.data.store import METADATA
from moa_search.errors import ConfigError, FileFormatError, ModelMismatchError
from moa_search.tasks import build_samples


@pytest.fixture
def samples(plain_tokenizer):
    made = build_samples(plain_tokenizer, length=400, count=4, seed=0, split="test")
    short = Sample(np.arange(40), 3, "records", 0.25, "a.jsonl#3", 64, "records:a.jsonl")
    return [*made, short]


@pytest.fixture
def saved(samples, plain_tokenizer, tmp_path):
    save_samples(samples, tmp_path / "deep" / "er", plain_tokenizer, split="test", settings={"seed": 3})
    return tmp_path / "deep" / "er"


def test_what_is_saved_is_read(saved, samples, plain_tokenizer):
    stored = load_samples(saved, plain_tokenizer)
    assert stored.split == "test"
    assert stored.settings == {"seed": 3}
    for one, two in zip(stored.samples, samples, strict=True):
        assert one.ids.dtype == np.int64
        assert {**vars(one), "ids": one.ids.tolist()} == {**vars(two), "ids": two.ids.tolist()}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["er"]


def test_it_is_a_data_set_to_look_at(saved, samples, plain_tokenizer):
    rows = datasets.load_from_disk(str(saved))
    assert rows["prompt"][0] == plain_tokenizer.decode(samples[0].prompt)
    assert rows["answer"][0] == plain_tokenizer.decode(samples[0].answer)
    assert json.loads((saved / METADATA).read_text())["schema"] == "moa-samples/1"


def test_samples_are_replaced_but_nothing_else_is(saved, samples, plain_tokenizer, tmp_path):
    save_samples(samples[:1], saved, plain_tokenizer, split="test")
    assert len(load_samples(saved, plain_tokenizer).samples) == 1
    with pytest.raises(ConfigError, match="exists and holds no samples"):
        save_samples(samples, tmp_path, plain_tokenizer, split="test")
    with pytest.raises(ConfigError, match="there are no samples to save"):
        save_samples([], tmp_path / "other", plain_tokenizer, split="test")


def test_a_place_that_cannot_be_written(samples, plain_tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        save_samples(samples, tmp_path / "file" / "x", plain_tokenizer, split="test")


def test_another_tokenizer_is_refused(saved, chat_tokenizer):
    with pytest.raises(ModelMismatchError, match="made with another tokenizer"):
        load_samples(saved, chat_tokenizer)


def test_no_such_folder(plain_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="no such folder of samples"):
        load_samples(tmp_path / "none", plain_tokenizer)


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-50])


def _edit(key, value):
    def edit(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return edit


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (METADATA, lambda path: path.unlink(), "damaged one"),
        (METADATA, _shorten, "damaged one"),
        (METADATA, lambda path: path.write_text("[1]"), "damaged one"),
        (METADATA, _edit("schema", "moa-samples/2"), "schema moa-samples/2 is unknown"),
        (METADATA, _edit("hash", "sha256:0"), "its data don't match their hash"),
        (METADATA, _edit("split", "other"), "damaged one"),
        (METADATA, _edit("settings", 3), "damaged one"),
        ("data-00000-of-00001.arrow", _shorten, "damaged one|don't match"),
        ("data-00000-of-00001.arrow", lambda path: path.unlink(), "damaged one"),
        ("data-00000-of-00001.arrow", lambda path: path.write_bytes(b"x"), "damaged one"),
        ("state.json", lambda path: path.write_text("{"), "damaged one"),
        ("dataset_info.json", lambda path: path.unlink(), "damaged one"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(saved, plain_tokenizer, file, change, message):
    change(saved / file)
    with pytest.raises(FileFormatError, match=message) as caught:
        load_samples(saved, plain_tokenizer)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)
