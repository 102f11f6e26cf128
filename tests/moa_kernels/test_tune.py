"""Tuning: what is timed runs, the fastest setting is remembered, and there is nothing to do without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from moa_kernels import launch, tune
from moa_kernels.launch import LaunchConfig, launch_config, overridden

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what there is to tune")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "moa_kernels.tune"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "python -m moa_kernels.tune: error: there is no CUDA device to tune for"


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted tiles; a GPU has its own")
@pytest.mark.parametrize("kernel", list(tune.CANDIDATES))
def test_what_is_timed_runs(kernel, monkeypatch):
    for name, size in (("HEADS", 2), ("KV_HEADS", 1), ("SPANS", tune.HeadSpans.of([(0, 64)], sink=4, min_span=20))):
        monkeypatch.setattr(tune, name, size)
    with overridden(kernel, LaunchConfig(64, 32, 4, 2)):
        assert tune.measure(tune.task(kernel, 16, 128, torch.device("cpu")), torch.device("cpu")) > 0


def test_the_fastest_setting_that_runs_is_remembered(monkeypatch, tmp_path, capsys):
    fastest = LaunchConfig(64, 128, 4, 2)

    def measure(run, device):
        config = launch._overrides["prefill"]
        if config.num_stages == 4:
            raise RuntimeError("out of shared memory")
        return 1.0 if config == fastest else 2.0

    monkeypatch.setenv("MOA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "task", lambda *_: None)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    launch.forget_tuned()
    tune.main(["--kernels", "prefill", "--head-dims", "128"])
    assert launch_config("prefill", torch.device("cuda"), 128, 2) == fastest
    printed = capsys.readouterr().out
    assert f"prefill 128: 1.000 ms with {fastest}" in printed
    assert printed.count("RuntimeError") == 12
    assert str(tmp_path / "kernels-NVIDIA-H200.json") in printed
    launch.forget_tuned()


def test_a_kernel_that_runs_with_no_setting_leaves_the_file_alone(monkeypatch, tmp_path, capsys):
    def measure(run, device):
        raise RuntimeError("no kernel image")

    monkeypatch.setenv("MOA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "task", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        tune.main(["--kernels", "decode"])
    assert "decode runs with none of its settings at head_dim 128" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
