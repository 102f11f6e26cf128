from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from moa_search.errors import ConfigError, PlanFormatError, ProfileFormatError
from moa_search.formats import Plan, Profile
from moa_search.formats.files import (
    atomic_write,
    canonical_json,
    file_kind,
    nearest,
    one_line,
    parse_json,
    sha256_of,
)


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, interruption: type[BaseException]) -> None:
    target = tmp_path / "plan.json"
    target.write_bytes(b"old")

    def write_half() -> None:
        with atomic_write(target) as file:
            file.write(b"half of the n")
            raise interruption

    with pytest.raises(interruption):
        write_half()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_complete_write_replaces_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "new folder" / "plan.json"
    for content in (b"old", b"new"):
        with atomic_write(target) as file:
            file.write(content)
        assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]
    sibling = target.with_name("sibling")
    sibling.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(sibling.stat().st_mode)


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    with atomic_write(target) as file:
        file.write(b"new")
        assert not target.exists()
    assert target.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "plan.json", tmp_path):
        with pytest.raises(ConfigError, match="can't be written") as caught, atomic_write(target) as file:
            file.write(b"new")
        assert str(caught.value).startswith(f"{target}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert list(tmp_path.parent.glob(f".{tmp_path.name}*")) == []


def test_canonical_json_depends_on_the_value_only() -> None:
    assert canonical_json({"b": [1, 2.5], "a": None}) == canonical_json({"a": None, "b": [1, 2.5]})
    assert canonical_json({"b": 1, "a": "ä"}) == b'{"a":"\\u00e4","b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_a_hash_tells_where_parts_end() -> None:
    assert sha256_of(b"ab", b"c") != sha256_of(b"a", b"bc")
    assert sha256_of(b"") != sha256_of()


def test_nearest_word() -> None:
    assert nearest("ancor", ["sink", "anchor"]) == " (did you mean 'anchor'?)"
    assert nearest("nothing alike", ["sink", "anchor"]) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
        ('{"a": {"b\\nc": 1, "b\\nc": 2}}', r"the key 'b\\nc' stands twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "1e999 is too large"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1', "line 1 column"),
        (b"\xff\xfe\xfd", "can't decode"),
    ],
)
def test_parse_json_is_strict(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(text)
    assert len(str(caught.value).splitlines()) == 1


def test_parse_json_reads_ordinary_json() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


def test_one_line() -> None:
    assert one_line("a\nb\x1b[0m\ud800ä") == "a\\nb\\x1b[0m\\ud800ä"
    assert len(one_line("x" * 10_000)) < 400


def test_files_of_ours_are_told_apart_by_what_they_hold(tiny_profile: Profile, tiny_plan: Plan, tmp_path: Path) -> None:
    tiny_profile.save(tmp_path / "profile")
    tiny_plan.save(tmp_path / "plan")
    assert file_kind((tmp_path / "profile").read_bytes()) == "profile"
    assert file_kind((tmp_path / "plan").read_bytes()) == "plan"
    for other in (b"", b"{", b"{}", b"\x00" * 20, b"\xff" * 4):
        assert file_kind(other) is None
    with pytest.raises(PlanFormatError, match="profile: it is a profile, no plan; moa-search makes plans from it"):
        Plan.load(tmp_path / "profile")
    with pytest.raises(ProfileFormatError, match="plan: it is a plan, no profile"):
        Profile.load(tmp_path / "plan")
