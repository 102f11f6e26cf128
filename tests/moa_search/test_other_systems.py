"""What Windows and macOS lack, taken away here: modules, system calls, /proc, Triton, a compiler, UTF-8 terminals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "profiles" / "smollm2-135m-instruct" / "quarter.json"

WHOLE_WAY = """
import importlib, pkgutil, re, sys
from tests.moa_search.without_linux import leave_linux

leave_linux()

import moa_kernels, moa_search

for package in (moa_search, moa_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # kernels in Triton's own language, and what starts them
            if error.name != "triton" or re.split("[._]", module.name)[-1] not in ("kernel", "launch", "device"):
                raise

import torch
from moa_search import MoACache, apply_plan, load_model, profile_model, search_plan
from moa_search.evaluation.machine import device_name
from moa_search.evaluation.throughput.memory import PeakMemory
from moa_search.inspection.frames.profiles import profile_facts
from moa_search.profiling.memory import peak_memory_bytes

model_dir, folder = sys.argv[1:]
model, tokenizer = load_model(model_dir, dtype="float32")
options = dict(lengths=[128], samples=2, sources=["copy"], answers="dataset", block=16, tiers=[16, 8, 4])
profile = profile_model((model, tokenizer), output=f"{folder}/profile.safetensors", **options)
assert profile.run.peak_memory_bytes is None and "peak" not in profile_facts(profile)["run"]
plan = search_plan(profile, kv_share=0.5)
apply_plan(model, plan)
prompt = torch.arange(2, 130)[None]
with PeakMemory(torch.device("cpu")) as memory:
    made = model.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
assert memory.peak_bytes is None and isinstance(made.past_key_values, MoACache)
print(device_name(torch.device("cpu")), made.sequences.shape[1] - 128, file=sys.stderr)
"""


@pytest.fixture
def environment(tmp_path):
    """Without a compiler, and with an empty cache of compiled kernels."""
    nowhere = {"PATH": "", "MOA_KERNELS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    return {**os.environ, **nowhere, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CXX": ""}


def test_all_modules_and_the_whole_way_from_model_to_tokens(tiny_model_dir, tmp_path, environment):
    command = [sys.executable, "-c", WHOLE_WAY, tiny_model_dir, tmp_path]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.split()[-1] == "5"
    assert "torch runs instead of cpu: the CPU kernels aren't available: no C++ compiler was found" in done.stderr


@pytest.mark.parametrize("words", [(PLAN,), ("--help",), ("nö→such",), ("diff", "nö→such")], ids=str)
def test_commands_print_where_streams_are_not_utf_8(environment, words):
    """As Python under Windows makes them, where a command's output goes into a file or a pipe."""
    code = "from moa_search.cli.inspect import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=environment | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == (2 if "nö→such" in words else 0), done.stderr
    out, err = done.stdout.decode("cp1252"), done.stderr.decode("cp1252")
    assert "Traceback" not in err
    assert len(err.splitlines()) == (1 if done.returncode else 0), err
    if words == (PLAN,):
        assert "≈" not in out
        assert "~ " in out, "extrapolated losses"
