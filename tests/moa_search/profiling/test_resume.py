"""A run that was stopped goes on where it was; one with other settings doesn't."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moa_search.data import Sample
from moa_search.errors import ConfigError
from moa_search.profiling import discard_results, profile_samples, results_folder
from moa_search.profiling.measure import SampleMeter

from .killed_runs import make_model

KILLS = 20


def make_samples(count=4, seed=0):
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(0, 64, 90), 4, "passkey", 0.5, "random") for _ in range(count)]


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A folder with the first two samples of four, of a run that then met an error."""
    measure = SampleMeter.measure

    def stop_at_two(self, modules, sample, number):
        if number == 2:
            raise KeyboardInterrupt
        return measure(self, modules, sample, number)

    monkeypatch.setattr(SampleMeter, "measure", stop_at_two)
    with pytest.raises(KeyboardInterrupt):
        profile_samples(make_model(), make_samples(), partial=tmp_path / "partial")
    monkeypatch.setattr(SampleMeter, "measure", measure)
    return tmp_path / "partial"


@pytest.mark.slow
def test_killed_at_any_moment_the_profile_is_the_same(tmp_path):
    """kill -9 at random moments; what had been measured isn't measured again, to the last bit."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_runs.py"), tmp_path, str(KILLS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, *runs = map(json.loads, done.stdout.splitlines())
    assert len(runs) == KILLS
    assert [run["checksum"] for run in runs] == [whole["checksum"]] * KILLS
    assert [run["resumed"] for run in runs] == [run["found"] for run in runs]
    assert sum(0 < run["found"] < 12 for run in runs) >= KILLS // 4, "too few were killed in the middle"


def test_what_was_measured_is_not_measured_again(stopped):
    samples = make_samples()
    resumed = profile_samples(make_model(), samples, partial=stopped)
    assert (resumed.run.resumed, resumed.run.measured) == (2, 2)
    assert resumed.checksum == profile_samples(make_model(), samples).checksum


def test_result_damaged_on_disk_is_measured_again(stopped):
    file = stopped / "sample-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    resumed = profile_samples(make_model(), make_samples(), partial=stopped)
    assert resumed.run.resumed == 1
    assert resumed.checksum == profile_samples(make_model(), make_samples()).checksum


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sink": 8}, "sink was 16, is 8"),
        ({"block": 16}, "block was 32, is 16"),
        ({"row_buckets": 16}, "row_buckets was 32, is 16"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"samples": make_samples(seed=1)}, r"calibration\.hash was"),
        ({"samples": make_samples(count=5)}, r"settings: calibration\.samples was 4, is 5\. Go on"),
        ({"model": make_model(seed=1)}, "weights was"),
        ({"model": make_model().bfloat16()}, "dtype was float32, is bfloat16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_and_named(stopped, changes, named):
    options = {"model": make_model(), "samples": make_samples(), **changes}
    with pytest.raises(ConfigError, match=named):
        profile_samples(partial=stopped, **options)


def test_start_anew(stopped):
    run = profile_samples(make_model(), make_samples(), sink=8, partial=stopped, resume=False).run
    assert (run.resumed, run.measured) == (0, 4)


def test_settings_that_cannot_be_read(stopped):
    (stopped / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="delete the folder"):
        profile_samples(make_model(), make_samples(), partial=stopped)


def test_a_folder_that_cannot_be_removed_is_named(tmp_path):
    file = tmp_path / "profile.safetensors.partial"
    file.write_text("not a folder")
    with pytest.raises(ConfigError, match=r"can't be removed .* delete it by hand"):
        discard_results(file)


def test_folder_lies_beside_the_profile_and_goes(tmp_path):
    folder = results_folder(tmp_path / "out" / "profile.safetensors")
    assert folder == tmp_path / "out" / "profile.safetensors.partial"
    profile_samples(make_model(), make_samples(), partial=folder)
    assert folder.is_dir()
    discard_results(folder)
    discard_results(folder)
    assert not folder.exists()
