"""Measured losses in a shared folder: found again, never mixed up, never trusted when damaged."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from moa_search.errors import ConfigError
from moa_search.evaluation.loss_cache import DENSE_PLAN, LossCache, LossKey

KEY = LossKey("sha256:" + "a" * 64, "sha256:" + "b" * 64, "float32", "sha256:" + "c" * 64, 1024)
LOSSES = (0.1, 2.0, 1e-300)


@pytest.fixture
def kept(tmp_path):
    """The only file of a folder that `LOSSES` were put into."""
    LossCache(tmp_path).put(KEY, LOSSES)
    (path,) = tmp_path.iterdir()
    return path


def test_what_was_put_is_found_by_the_next(kept, tmp_path):
    assert LossCache(tmp_path).get(KEY, 3) == LOSSES


def test_a_shared_folder_never_shows_half_a_file(tmp_path):
    """Eight writers of one key, and readers that see nothing or all."""
    many = tuple(float(i) for i in range(1000))

    def work(number):
        LossCache(tmp_path).put(KEY, many)
        return LossCache(tmp_path).get(KEY, 1000)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(64))) == {many}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"plan": DENSE_PLAN},
        {"plan": "sha256:" + "a" * 63 + "b"},
        {"weights": "sha256:0"},
        {"dtype": "float16"},
        {"data": "sha256:0"},
        {"length": 1025},
    ],
)
def test_another_key_is_another_file(tmp_path, change):
    cache, other = LossCache(tmp_path), replace(KEY, **change)
    cache.put(KEY, LOSSES)
    assert cache.get(other, 3) is None
    cache.put(other, (5.0, 6.0, 7.0))
    assert LossCache(tmp_path).get(KEY, 3) == LOSSES
    assert LossCache(tmp_path).get(other, 3) == (5.0, 6.0, 7.0)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_version_measures_anew(kept, tmp_path, monkeypatch):
    monkeypatch.setattr("moa_search.evaluation.result_folder.__version__", "99")
    assert LossCache(tmp_path).get(KEY, 3) is None


def test_without_a_folder_it_lasts_as_long_as_the_object():
    cache = LossCache()
    assert cache.get(KEY, 3) is None
    cache.put(KEY, LOSSES)
    assert cache.get(KEY, 3) == LOSSES
    assert LossCache().get(KEY, 3) is None


def test_a_wrong_number_of_losses_counts_as_none(kept, tmp_path):
    assert LossCache(tmp_path).get(KEY, 4) is None


def test_damaged_files_count_as_none_and_are_replaced(kept, tmp_path):
    """Cut anywhere, and with any digit of a loss changed."""
    whole = kept.read_bytes()
    start = whole.index(b'"losses":') + len('"losses":')
    damaged = [whole[:end] for end in range(0, len(whole) - 1, 7)]
    damaged += [
        whole[:at] + b"7" + whole[at + 1 :] for at in range(start, whole.index(b"]")) if whole[at : at + 1] != b"7"
    ]
    damaged += [
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        whole.replace(b"0.1", b"NaN"),
        whole.replace(b"0.1", b"null"),
    ]
    for content in damaged:
        kept.write_bytes(content)
        assert LossCache(tmp_path).get(KEY, 3) is None, content
    LossCache(tmp_path).put(KEY, LOSSES)
    assert kept.read_bytes() == whole


def test_a_file_of_another_key_is_not_believed(kept, tmp_path):
    """Such as one that was renamed by hand."""
    other = replace(KEY, length=2048)
    LossCache(tmp_path).put(other, (1.0, 1.0, 1.0))
    (path,) = set(tmp_path.iterdir()) - {kept}
    path.write_bytes(kept.read_bytes())
    assert LossCache(tmp_path).get(other, 3) is None


def test_files_say_what_they_hold(kept):
    content = json.loads(kept.read_text())
    assert kept.name.startswith("aaaaaaaaaaaa-1024-")
    assert content["schema"] == "moa-losses/1"
    assert (content["plan"], content["dtype"], content["length"]) == (KEY.plan, "float32", 1024)
    assert content["losses"] == list(LOSSES)


def test_a_folder_that_cannot_be_made_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="this folder for measured losses can't be made"):
            LossCache(folder)


def test_a_folder_without_losses_is_not_made(tmp_path):
    cache = LossCache(tmp_path / "below" / "losses")
    assert cache.get(KEY, 3) is None
    assert not (tmp_path / "below").exists()
    cache.put(KEY, LOSSES)
    assert LossCache(tmp_path / "below" / "losses").get(KEY, 3) == LOSSES
