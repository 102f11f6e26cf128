"""moa-profile under torchrun: several processes, the same file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa_search import Profile, api

OPTIONS = ("--lengths", "300", "420", "--samples", "3", "--answers", "dataset", "--dtype", "float32")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command as a script, as an installation puts it on PATH."""
    path = tmp_path_factory.mktemp("bin") / "moa-profile"
    path.write_text(f"#!{sys.executable}\nfrom moa_search.cli.profile import main\n\nmain()\n")
    path.chmod(0o755)
    return path


def torchrun(command, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
         str(command), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_make_the_file_that_one_makes(command, tiny_model_dir, tmp_path):
    """To the last bit: every sample is measured by one process, and they are summed up in their order."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    subprocess.run([command, "--model", tiny_model_dir, *OPTIONS, "--output", one], env=environment, check=True)
    done = torchrun(command, "--model", tiny_model_dir, *OPTIONS, "--output", two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("profile written to") == 1, "only the first process prints"
    assert "6 samples measured" in done.stdout
    assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


@pytest.mark.slow
def test_an_error_ends_all_processes_with_one_line(command, tiny_model_dir, tmp_path):
    out = tmp_path / "p.safetensors"
    done = torchrun(command, "--model", tiny_model_dir, "--lengths", "5000", "--output", out)
    assert done.returncode != 0
    assert done.stderr.count("moa-profile: error: ") == 1
    assert "5000 is over the model's context" in done.stderr


def test_the_result_does_not_depend_on_the_number_of_threads_beyond_rounding(tiny_model_dir):
    import numpy as np
    import torch

    before, profiles = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        profiles.append(api.profile_model(str(tiny_model_dir), lengths=[300], samples=2, answers="dataset"))
    torch.set_num_threads(before)
    first, second = (profile.by_length[300].per_sample["squared"] for profile in profiles)
    np.testing.assert_allclose(first, second, rtol=1e-2, atol=1e-3 * first.max())


def test_one_model_on_all_gpus_and_one_process_for_each_exclude_each_other(monkeypatch, tiny_model_dir):
    from contextlib import contextmanager

    from moa_search.errors import ConfigError
    from moa_search.parallel import Workers

    @contextmanager
    def two():
        yield Workers(0, 2)

    monkeypatch.setattr("moa_search.parallel.joined", two)
    with pytest.raises(ConfigError, match=r"device_map .* torchrun"):
        api.profile_model(str(tiny_model_dir), device_map="auto")


def test_device_map_spreads_the_model_through_accelerate(tiny_model_dir):
    """On a machine without a GPU that is the CPU alone, with accelerate's hooks on every module."""
    options = {"lengths": [300], "samples": 2, "answers": "dataset", "dtype": "float32"}
    spread = api.profile_model(str(tiny_model_dir), **options, device_map="auto")
    whole = api.profile_model(str(tiny_model_dir), **options)
    assert isinstance(spread, Profile)
    assert spread.checksum == whole.checksum


def test_command_is_installed_under_its_name():
    scripts = Path(__file__).parents[3] / "pyproject.toml"
    assert 'moa-profile = "moa_search.cli.profile:main"' in scripts.read_text()
