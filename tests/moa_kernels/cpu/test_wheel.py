"""Wheels for a platform: built in a clean folder, they run where there is no compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from moa_kernels.cpu import build

REPOSITORY = Path(__file__).parents[3]

USE = """
import torch
from moa_kernels.backends import choose
from moa_kernels.cpu.build import find_library
from moa_kernels.prefill import span_prefill
from moa_kernels.spans import HeadSpans
states = torch.randn(1, 2, 40, 24)
found = span_prefill(states, states, states, HeadSpans.dense(2), impl="cpu")[0]
torch.testing.assert_close(found, span_prefill(states, states, states, HeadSpans.dense(2), impl="torch")[0])
print(choose("auto", states, head_dim=24), find_library())
"""


def built(tmp_path, **environment):
    """A wheel from a copy of what git tracks."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("needs a checkout")
    for name in listed.stdout.splitlines():
        if name.startswith(("moa_search/", "kernels/moa_kernels/")) or "/" not in name:
            (tmp_path / "clean" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, tmp_path / "clean" / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path / "out"),
    ]
    subprocess.run([*command, str(tmp_path / "clean")], check=True, env={**os.environ, **environment})
    (wheel,) = (tmp_path / "out").iterdir()
    return wheel


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or not build.has_compiler(), reason="needs a compiler for x86-64")
def test_a_wheel_with_kernels_runs_without_a_compiler(tmp_path, shared_compiler):
    pytest.importorskip("setuptools")
    wheel = built(tmp_path, CXX=shared_compiler)
    assert wheel.name.endswith(f"-py3-none-{sysconfig.get_platform().replace('-', '_')}.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"moa_kernels/cpu/built/moa_cpu-{name}.so" for name in build.VARIANTS["x86_64"]} <= names
    assert "moa_kernels/cpu/source/library.cpp" in names
    fresh = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
    (site,) = fresh.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)  # what pip does with a wheel that has no scripts to write
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch, from this environment
    done = subprocess.run(
        [str(fresh / "bin" / "python"), "-c", USE],
        env={"PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    chosen, _, library = done.stdout.strip().partition(" ")
    assert chosen == "cpu"
    assert library.startswith(str(site)), "not compiled"


@pytest.mark.slow
def test_a_wheel_without_kernels_is_for_any_platform(tmp_path):
    pytest.importorskip("setuptools")
    wheel = built(tmp_path, MOA_CPU_VARIANTS="")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
