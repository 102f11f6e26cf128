"""Scripts follow when modules move; nothing else runs most of them."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_everything_that_a_script_imports_is_there(script, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    found = runpy.run_path(str(script), run_name="imported")
    assert (SCRIPTS.parent / found.get("PROGRAM", "")).exists()
