"""Finding and compiling the library: without a compiler, by two processes at once, for other processors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moa_kernels.cpu import build

REPOSITORY = Path(__file__).parents[3]

COMPILER = pytest.mark.skipif(build._compiler() is None, reason="needs a C++ compiler")

ATTEND = """
import logging, torch
from moa_kernels.backends import choose
from moa_kernels.prefill import span_prefill
from moa_kernels.spans import HeadSpans
logging.basicConfig(format="%(name)s: %(message)s")
states = torch.randn(1, 2, 40, 24)
for _ in range(2):
    found = span_prefill(states, states, states, HeadSpans.dense(2))[0]
expected = span_prefill(states, states, states, HeadSpans.dense(2), impl="torch")[0]
torch.testing.assert_close(found, expected)
print(choose("auto", states, head_dim=24))
"""


def environment(cache, **changes):
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "MOA_CPU_TARGET")}
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "kernels")))
    return {**kept, "PYTHONPATH": path, "MOA_KERNELS_CACHE": str(cache), "OMP_NUM_THREADS": "1", **changes}


def run(script, cache, **changes):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment(cache, **changes), capture_output=True, text=True, check=False)


def test_without_a_compiler_auto_runs_torch_and_says_so_once(tmp_path):
    done = run(ATTEND, tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch"
    assert done.stderr.splitlines() == [
        "moa_kernels.backends: torch runs instead of cpu: the CPU kernels aren't available: no C++ compiler was found "
        "(g++, clang++ or $CXX)"
    ]
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_cpu_is_an_error(tmp_path):
    script = ATTEND.replace("HeadSpans.dense(2))[0]", "HeadSpans.dense(2), impl='cpu')[0]")
    done = run(script, tmp_path, PATH=str(tmp_path))
    assert "BackendUnavailableError: the CPU kernels aren't available: no C++ compiler was found" in done.stderr


@COMPILER
def test_a_compiler_that_fails_is_quoted(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: cannot do this' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run(ATTEND, tmp_path / "cache", CXX=str(compiler))
    assert done.stdout.strip() == "torch"
    assert "failed: x.cpp:1: error: cannot do this" in done.stderr
    assert not list((tmp_path / "cache").iterdir())


@COMPILER
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(ATTEND, tmp_path / "file")
    assert done.stdout.strip() == "torch"
    assert f"{tmp_path / 'file'} can't be written" in done.stderr


def test_two_processes_may_compile_at_once(tmp_path, shared_compiler):
    settings = environment(tmp_path, CXX=shared_compiler)
    both = [
        subprocess.Popen([sys.executable, "-c", ATTEND], env=settings, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in both] == ["cpu", "cpu"]
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    assert run(ATTEND, tmp_path, CXX=shared_compiler).stdout.strip() == "cpu"
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [written], "compiled once"


SHIPPED = build.VARIANTS["x86_64"]

TARGETS = {
    **{target: needed for target, needed in SHIPPED.values() if target != SHIPPED["v4-bf16"][0]},  # as "native" has it
    "native": frozenset(),
    "native -DMOA_TILES_EMULATED": frozenset(),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_builds_for_other_processors_pass_the_same_tests(target, tmp_path, shared_compiler):
    """Vectors of 4, 8 and 16 floats, products of bfloat16 pairs, and the layout of AMX tiles."""
    if not TARGETS[target] <= build.processor_flags() or (build.platform.machine() != "x86_64" and "x86" in target):
        pytest.skip("this processor can't run it")
    tests = str(Path(__file__).with_name("test_kernels.py"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        tests,
        "--all-seeds",
        "-k",
        "not test_auto",
    ]
    settings = environment(tmp_path, MOA_CPU_TARGET=target, CXX=shared_compiler)
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_the_best_variant_that_the_processor_can_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    for name in ("v4-bf16", "v4", "v3"):
        (tmp_path / f"moa_cpu-{name}.so").write_text("")
    for flags, expected in (
        (build.V4 | {"avx512_bf16"}, "v4-bf16"),
        (build.V4, "v4"),
        (build.V3, "v3"),
        ({"sse2"}, None),
    ):
        monkeypatch.setattr(build, "processor_flags", lambda flags=flags: frozenset(flags))
        found = build.shipped_library(tmp_path)
        assert (found and found.name) == (expected and f"moa_cpu-{expected}.so")


def test_what_is_compiled_is_found_by_all_that_it_depends_on(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text("one")
    keys = [build._key(str(compiler), ["-march=native"]), build._key(str(compiler), ["-march=haswell"])]
    compiler.write_text("another one")
    keys.append(build._key(str(compiler), ["-march=native"]))
    monkeypatch.setattr(build, "_processor_line", lambda: "other flags")
    keys.append(build._key(str(compiler), ["-march=native"]))
    source = tmp_path / "source"
    source.mkdir()
    (source / "library.cpp").write_text("other")
    monkeypatch.setattr(build, "SOURCE", source)
    keys.append(build._key(str(compiler), ["-march=native"]))
    assert len(set(keys)) == 5
