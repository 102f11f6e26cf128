"""The notebooks run from top to bottom, in a kernel of their own, and are stored without outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_some():
    assert [path.stem for path in NOTEBOOKS] == ["compare_plans", "inspect_plan"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_something(path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # bars go to where warnings would show
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert any("<svg" in output.get("data", {}).get("text/html", "") for output in outputs)
    written = [output for output in outputs if output.get("name") == "stderr"]
    assert not written, written


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    """Outputs in a repository go stale and make diffs unreadable."""
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs"), f"clear the outputs of {path.name}"
        assert cell.get("execution_count") is None
