"""Writing a front, and reading it back."""

import contextlib
import csv

import pytest

from moa_search.errors import ConfigError
from moa_search.formats import Plan
from moa_search.formats.files import atomic_write
from moa_search.search import Front, SearchOptions, search_profile


@pytest.fixture
def front(tiny_profile):
    return search_profile(tiny_profile, SearchOptions(density=[0.4], criterion="squared", front_steps=3))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_plan_can_be_read_back(front, tmp_path):
    front.save(tmp_path / "new" / "folder")
    written = tmp_path / "new" / "folder"
    assert Plan.load(written / "plan.json") == front.chosen
    assert len(front.plans) > 1
    for index, plan in enumerate(front.plans):
        assert Plan.load(written / "front" / f"plan-{index:02d}.json") == plan
    assert len(files(written)) == len(front.plans) + 2


class TestLoad:
    def test_what_was_saved(self, front, tmp_path):
        for chosen in range(len(front.plans)):
            saved = Front(front.plans, chosen)
            saved.save(tmp_path)
            before = files(tmp_path)
            assert Front.load(tmp_path) == saved
            Front.load(tmp_path).save(tmp_path)
            assert files(tmp_path) == before

    def test_numbers_are_kept_where_one_is_missing(self, front, tmp_path):
        front.save(tmp_path)
        (tmp_path / "front" / "plan-01.json").unlink()
        (tmp_path / "front" / "plan-1-old.json").write_text("no plan of it")
        loaded = Front.load(tmp_path)
        assert loaded.names == [name for name in front.names if name != "01"]
        assert [Plan.load(tmp_path / file) for file in loaded.files] == list(loaded.plans)

    def test_a_choice_from_elsewhere_comes_last(self, front, tiny_plan, tmp_path):
        front.save(tmp_path)
        tiny_plan.save(tmp_path / "plan.json")
        loaded = Front.load(tmp_path)
        assert loaded.chosen == loaded.plans[-1] == tiny_plan
        assert loaded.names[-1] == f"{len(front.plans):02d}"

    def test_a_front_without_a_choice(self, front, tmp_path):
        front.save(tmp_path)
        (tmp_path / "plan.json").unlink()
        loaded = Front.load(tmp_path)
        assert loaded.chosen_index is None
        assert not any(loaded.is_chosen(index) for index in range(len(front.plans)))
        with pytest.raises(ConfigError, match="moa-search validate"):
            loaded.chosen  # noqa: B018


def test_table_has_the_numbers_of_every_plan(front, tmp_path):
    front.save(tmp_path)
    with open(tmp_path / "front" / "front.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["plan"] for row in rows] == [f"plan-{i:02d}.json" for i in range(len(front.plans))]
    for row, plan in zip(rows, front.plans, strict=True):
        for metrics in plan.predicted:
            assert float(row[f"density@{metrics.length}"]) == metrics.density
            assert float(row[f"attention_density@{metrics.length}"]) == metrics.attention_density
            assert float(row[f"loss@{metrics.length}"]) == metrics.loss
            assert float(row[f"loss_error@{metrics.length}"]) == metrics.loss_error
        assert float(row["gap"]) == plan.provenance.gap


def test_a_plan_without_origin_has_an_empty_gap(tiny_plan):
    bare = tiny_plan.model_copy(update={"provenance": None})
    (row,) = Front([bare]).rows()
    assert row["gap"] is None
    assert row["loss@1024"] == 0.125


def test_a_smaller_front_takes_the_place_of_a_larger_one(front, tmp_path):
    front.save(tmp_path)
    (tmp_path / "front" / "notes.txt").write_text("mine")
    smaller = Front(front.plans[1:2])
    smaller.save(tmp_path)
    assert set(files(tmp_path)) == {"plan.json", "front/plan-00.json", "front/front.csv", "front/notes.txt"}
    assert Plan.load(tmp_path / "plan.json") == Plan.load(tmp_path / "front" / "plan-00.json") == smaller.chosen


class FullDisk:
    def write(self, data):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("blocked", ["plan.json", "front.csv", "plan-01.json"])
def test_an_error_leaves_the_old_files_alone(front, tmp_path, monkeypatch, blocked):
    @contextlib.contextmanager
    def until_full(path):
        with atomic_write(path) as file:
            yield FullDisk() if path.name == blocked else file

    Front(front.plans[::-1]).save(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr("moa_search.search.front.atomic_write", until_full)
    with pytest.raises(ConfigError, match=rf"{blocked}: can't be written \(No space left"):
        front.save(tmp_path)
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written(front, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        front.save(tmp_path / "file" / "folder")


def test_a_folder_in_the_place_of_the_plan(front, tmp_path):
    (tmp_path / "plan.json").mkdir()
    (tmp_path / "front").mkdir()
    (tmp_path / "front" / "plan-99.json").write_text("older")
    with pytest.raises(ConfigError, match=r"plan\.json: can't be written"):
        front.save(tmp_path)
    assert files(tmp_path) == {"front/plan-99.json": b"older"}


def test_a_folder_in_the_place_of_one_of_the_front(front, tmp_path):
    (tmp_path / "front" / "plan-00.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"plan-00\.json: can't be written"):
        front.save(tmp_path)
    assert files(tmp_path) == {}
