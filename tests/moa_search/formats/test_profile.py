from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from moa_search.errors import ConfigError, ProfileFormatError, ProfileVersionError
from moa_search.formats import Profile
from moa_search.formats import profile as profile_module
from moa_search.formats.profile import METADATA_KEY
from moa_search.formats.profile_content import SAMPLE_STATISTICS, LengthHeader

Content = dict[str, Any]
Tensors = dict[str, np.ndarray]


@pytest.fixture
def path(tiny_profile: Profile, tmp_path: Path) -> Path:
    target = tmp_path / "tiny.safetensors"
    tiny_profile.save(target)
    return target


def rewrite(path: Path, change: Callable[[Content, Tensors], None]) -> None:
    """Change the header and tensors of a profile file, the stored checksum aside."""
    raw = path.read_bytes()
    outer = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    content, tensors = json.loads(outer["__metadata__"][METADATA_KEY]), load(raw)
    change(content, tensors)
    path.write_bytes(save(tensors, metadata={METADATA_KEY: json.dumps(content)}))


def error_of(path: Path, kind: type[Exception] = ProfileFormatError) -> str:
    with pytest.raises(kind) as caught:
        Profile.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def replaced(profile: Profile, length: int, **fields: Any) -> Profile:
    """``profile`` with some fields of one length replaced."""
    entry = dataclasses.replace(profile.by_length[length], **fields)
    return Profile(profile.header, {**profile.by_length, length: entry})


def test_round_trip_keeps_what_its_precision_can_hold(tiny_profile: Profile, path: Path) -> None:
    loaded = Profile.load(path)
    assert loaded.header == tiny_profile.header
    assert loaded.lengths == [512, 1024]
    for length, original in tiny_profile.by_length.items():
        entry = loaded.by_length[length]
        assert entry.header == original.header
        np.testing.assert_array_equal(entry.loss, original.loss)
        for name, values in original.mean.items():
            np.testing.assert_array_equal(entry.mean[name], values)
            np.testing.assert_array_equal(entry.error[name], original.error[name])
        for name, values in original.per_sample.items():
            largest = values.max(axis=(-2, -1), keepdims=True)
            error = np.abs(entry.per_sample[name] - values)
            assert (error <= values * 2**-11 + largest * 2**-24).all()
            assert entry.per_sample[name].dtype == np.float32


def test_saving_what_was_loaded_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    Profile.load(path).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert Profile.load(path).checksum == Profile.load(tmp_path / "again.safetensors").checksum


def test_bytes_do_not_depend_on_the_process(path: Path, tmp_path: Path) -> None:
    script = "import sys; from moa_search.formats import Profile; Profile.load(sys.argv[1]).save(sys.argv[2])"
    for number in range(3):
        again = tmp_path / f"{number}.safetensors"
        subprocess.run([sys.executable, "-c", script, path, again], check=True)
        assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_tiny_and_huge_values_survive(tiny_profile: Profile, tmp_path: Path, scale: float) -> None:
    original = tiny_profile.by_length[512].per_sample
    scaled = {name: values * np.float32(scale) for name, values in original.items()}
    replaced(tiny_profile, 512, per_sample=scaled).save(tmp_path / "scaled")
    loaded = Profile.load(tmp_path / "scaled").by_length[512].per_sample
    for name, values in scaled.items():
        largest = values.max(axis=(-2, -1), keepdims=True)
        np.testing.assert_allclose(loaded[name] / largest, values / largest, rtol=2**-11, atol=2**-24)


def test_signs_and_heads_without_influence_survive(tiny_profile: Profile, tmp_path: Path) -> None:
    signed = tiny_profile.by_length[512].per_sample["signed"] * np.float32(-1)
    signed[:, 1] = 0
    per_sample = {"squared": np.abs(signed), "signed": signed}
    replaced(tiny_profile, 512, per_sample=per_sample).save(tmp_path / "signed")
    loaded = Profile.load(tmp_path / "signed").by_length[512].per_sample["signed"]
    assert (loaded[:, 1] == 0).all()
    np.testing.assert_allclose(loaded, signed, rtol=2**-11, atol=1e-6)


def test_double_precision_and_strided_arrays_are_stored_as_they_read(
    tiny_profile: Profile, path: Path, tmp_path: Path
) -> None:
    mean = tiny_profile.by_length[512].mean
    strided = {name: np.asfortranarray(values.astype(np.float64)) for name, values in mean.items()}
    replaced(tiny_profile, 512, mean=strided).save(tmp_path / "strided")
    assert (tmp_path / "strided").read_bytes() == path.read_bytes()


def test_equality_compares_values(tiny_profile: Profile, path: Path) -> None:
    loaded = Profile.load(path)
    assert loaded == Profile.load(path)
    assert loaded != tiny_profile  # float16
    error = {name: values.copy() for name, values in loaded.by_length[512].error.items()}
    error["recall"][2, 1, 3, 0] += 1
    assert replaced(loaded, 512, error=error) != loaded
    assert replaced(loaded, 512, error={}) != loaded
    assert loaded.by_length[512] != "something else"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(seed=1), "damaged, its content doesn't match its checksum"),
        (lambda c, t: c.pop("checksum"), "damaged, its content doesn't match its checksum"),
        (lambda c, t: t["512/loss"].fill(0), "damaged, its content doesn't match its checksum"),
        (lambda c, t: t.pop("512/loss"), "damaged, its content doesn't match its checksum"),
        (lambda c, t: c.update(sede=1), "sede: unknown key (did you mean 'seed'?)"),
        (lambda c, t: c.update(seed="1"), "seed: Input should be a valid integer"),
        (
            lambda c, t: c["lengths"][1].update(windows=[64, 64, 1024]),
            "lengths.1: the windows at length 1024",
        ),
        (lambda c, t: c["lengths"][1].update(windows=[64, 512]), "lengths.1: the last window at length 1024"),
        (lambda c, t: c["lengths"].reverse(), "top level: the lengths don't increase"),
        (lambda c, t: c.pop("model"), "model: Field required"),
        (lambda c, t: c.pop("schema"), "not a moa-search profile"),
        (lambda c, t: c.update(schema="moa-plan/1"), "not a moa-search profile"),
    ],
)
def test_errors_say_what_and_where(path: Path, change: Callable[[Content, Tensors], None], message: str) -> None:
    rewrite(path, change)
    assert error_of(path).startswith(message)


def test_another_schema_asks_for_an_upgrade(path: Path) -> None:
    rewrite(path, lambda content, tensors: content.update(schema="moa-profile/4", new=1))
    assert error_of(path, ProfileVersionError).endswith("upgrade it")


class TestCellsLeftOut:
    """Where no head of any sample loses anything, as in most buckets' longer windows."""

    @staticmethod
    def stored(path: Path) -> Tensors:
        return load(path.read_bytes())

    def test_every_cell_is_there_again_once_read(self, tiny_profile: Profile, path: Path, tmp_path: Path) -> None:
        older = tiny_profile.header.model_copy(update={"schema_": "moa-profile/1"})
        Profile(older, tiny_profile.by_length).save(tmp_path / "older")
        whole, left_out = Profile.load(tmp_path / "older"), Profile.load(path)
        assert whole.by_length == left_out.by_length
        assert path.stat().st_size < 0.9 * (tmp_path / "older").stat().st_size
        for length, entry in left_out.by_length.items():
            zero = np.all([values == 0 for values in entry.per_sample.values()], axis=(0, 1, 2, 3))
            assert (self.stored(path)[f"{length}/measured"] == ~zero).all()
            assert zero.any()

    def test_older_files_stay_what_they_are(self, tiny_profile: Profile, tmp_path: Path) -> None:
        header = tiny_profile.header.model_copy(update={"schema_": "moa-profile/1"})
        Profile(header, tiny_profile.by_length).save(tmp_path / "one")
        Profile.load(tmp_path / "one").save(tmp_path / "two")
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        assert "512/measured" not in self.stored(tmp_path / "one")

    def test_one_cell_of_one_head_is_enough_to_be_kept(self, tiny_profile: Profile, tmp_path: Path) -> None:
        signed = tiny_profile.by_length[512].per_sample["signed"].copy()
        assert not signed[..., 0, -1].any()
        signed[1, 2, 0, 0, -1] = -signed[1, 2, 0].max()
        per_sample = {**tiny_profile.by_length[512].per_sample, "signed": signed}
        replaced(tiny_profile, 512, per_sample=per_sample).save(tmp_path / "kept")
        found = Profile.load(tmp_path / "kept").by_length[512].per_sample
        assert found["signed"][1, 2, 0, 0, -1] == signed[1, 2, 0, 0, -1]
        assert np.count_nonzero(found["signed"][..., 0, -1]) == 1
        assert not found["squared"][..., 0, -1].any()

    def test_nothing_lost_anywhere(self, tiny_profile: Profile, tmp_path: Path) -> None:
        entry = tiny_profile.by_length[512]
        nothing = {name: np.zeros_like(values) for name, values in entry.per_sample.items()}
        mean, error = (
            {name: values * np.float32(name == "recall") for name, values in group.items()}
            for group in (entry.mean, entry.error)
        )
        profile = replaced(tiny_profile, 512, per_sample=nothing, mean=mean, error=error)
        profile.save(tmp_path / "nothing")
        assert Profile.load(tmp_path / "nothing").by_length[512] == profile.by_length[512]

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda t: t.pop("512/measured"), "tensor 512/measured is missing"),
            (lambda t: t["512/measured"].fill(1), r"tensor 512/\w+ has shape .*, expected 24 cells"),
            (lambda t: t["512/measured"].fill(2), "tensor 512/measured holds more than 0 and 1"),
            (lambda t: t.update({"512/measured": t["512/measured"][:2]}), r"512/measured has shape \(2, 6\)"),
            (lambda t: t.update({"512/signed": np.array(1, np.float16)}), r"tensor 512/signed has shape \(\)"),
        ],
    )
    def test_damage_is_named(self, path: Path, change: Callable[[Any], None], says: str) -> None:
        def spoil(content: Content, tensors: Tensors) -> None:
            change(tensors)
            content.pop("checksum")
            content["checksum"] = profile_module._checksum(content, tensors)

        rewrite(path, spoil)
        assert re.search(says, error_of(path))

    def test_shapes_that_differ_are_not_written(self, tiny_profile: Profile, tmp_path: Path) -> None:
        narrow = {name: values[..., :-1] for name, values in tiny_profile.by_length[512].mean.items()}
        with pytest.raises(ProfileFormatError, match="not written"):
            replaced(tiny_profile, 512, mean=narrow).save(tmp_path / "never")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.safetensors: No such file"):
        Profile.load(tmp_path / "absent.safetensors")


def test_nothing_is_written_that_could_not_be_read(tiny_profile: Profile, tmp_path: Path) -> None:
    entry = tiny_profile.by_length[512]
    infinite = {name: values.copy() for name, values in entry.per_sample.items()}
    infinite[SAMPLE_STATISTICS[0]][0, 0, 0, 0, 0] = np.inf
    spare = Profile(tiny_profile.header, {**tiny_profile.by_length, 2048: entry})
    absent = Profile(tiny_profile.header, {512: entry})
    for profile, message in (
        (
            replaced(tiny_profile, 512, loss=np.full(3, np.nan)),
            "tensor 512/loss holds values that aren't finite",
        ),
        (replaced(tiny_profile, 512, per_sample=infinite), "tensor 512/squared"),
        (replaced(tiny_profile, 512, loss=np.zeros(2)), r"tensor 512/loss has shape \(2,\), expected \(3,\)"),
        (
            replaced(tiny_profile, 512, loss=np.full(3, 1e99)),
            "tensor 512/loss holds values that aren't finite",
        ),
        (absent, "tensor 1024/.* is missing"),
        (spare, "tensor 2048/.* belongs to no length"),
    ):
        with pytest.raises(ProfileFormatError, match=message):
            profile.save(tmp_path / "never")
    assert list(tmp_path.iterdir()) == []


class TestNativeLayers:
    def test_round_trip(self, native_profile: Profile, tmp_path: Path) -> None:
        native_profile.save(tmp_path / "one")
        loaded = Profile.load(tmp_path / "one")
        assert loaded.header == native_profile.header
        assert loaded.header.native_layers == (1,)
        assert loaded.header.searchable_layers == [0, 2]
        loaded.save(tmp_path / "two")
        assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()

    def test_a_file_without_any_does_not_name_them(self, path: Path) -> None:
        assert b"native_layers" not in path.read_bytes()
        assert Profile.load(path).header.native_layers == ()
        assert Profile.load(path).header.searchable_layers == [0, 1, 2]

    @pytest.mark.parametrize(
        ("native_layers", "message"),
        [
            ([1, 0], r"the native layers don't increase within 0\.\.2"),
            ([1, 1], "the native layers don't increase"),
            ([-1], "the native layers don't increase"),
            ([3], "the native layers don't increase"),
            ([0, 1, 2], "every layer is native, so there is no head that a plan could shorten"),
            (["1"], "native_layers.0: Input should be a valid integer"),
        ],
    )
    def test_they_are_some_of_the_layers(
        self, native_profile: Profile, tmp_path: Path, native_layers: list[Any], message: str
    ) -> None:
        native_profile.save(tmp_path / "profile")
        rewrite(tmp_path / "profile", lambda content, tensors: content.update(native_layers=native_layers))
        with pytest.raises(ProfileFormatError, match=message):
            Profile.load(tmp_path / "profile")

    def test_the_models_window_must_be_known(self, path: Path) -> None:
        rewrite(path, lambda content, tensors: content.update(native_layers=[1]))
        assert error_of(path) == "top level: layer 1 is native, but model.config names no sliding_window"

    @pytest.mark.parametrize("group", ["per_sample", "mean", "error"])
    def test_nothing_is_measured_there(self, native_profile: Profile, tmp_path: Path, group: str) -> None:
        next(iter(getattr(native_profile.by_length[1024], group).values()))[..., 1, 0, 2, 3] = 0.5
        with pytest.raises(ProfileFormatError, match="at length 1024 isn't zero in native layer 1"):
            native_profile.save(tmp_path / "never")


@pytest.mark.parametrize("windows", [(0, 64), (-1, 64), (64, 32, 64), (32,)])
def test_windows_form_a_grid(windows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="window"):
        LengthHeader(length=64, windows=windows, row_buckets=1, samples=1)
