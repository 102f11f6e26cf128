"""Scripts, benchmarks and tools follow when modules move; nothing else runs most of them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in ("scripts", "benchmarks", "tools") for path in (ROOT / folder).glob("*.py"))
OPTIONAL = {"take_screenshots": "playwright"}
"""What a script needs of an extra that tests do without."""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_everything_that_a_script_imports_is_there(script, monkeypatch):
    if script.stem in OPTIONAL:
        pytest.importorskip(OPTIONAL[script.stem])
    monkeypatch.syspath_prepend(str(script.parent))
    found = runpy.run_path(str(script), run_name="imported")
    assert (ROOT / found.get("PROGRAM", "")).exists()


def test_measure_front_finds_plans_from_a_made_up_profile():
    shape = ["--layers", "6", "--heads", "4", "--lengths", "512", "2048", "--samples", "4", "--density", "0.5"]
    command = [sys.executable, str(ROOT / "benchmarks" / "measure_front.py"), *shape, "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    row = json.loads(run.stdout)
    assert row["plans"] >= 2
    assert 0 <= row["largest_gap"] <= 1e-6
