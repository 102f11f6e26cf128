"""Texts that users read name nothing that an installed package doesn't have."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "moa_search", ROOT / "kernels" / "moa_kernels")
PROGRAMS = {
    "profile": ["", "merge"],
    "search": ["", "validate", "compare", "tune", "hardware"],
    "evaluate": ["", "lm-eval", "report", "throughput"],
    "inspect": ["plan", "profile", "diff", "front"],
}
PLACE = re.compile(r"[\w-][\w.-]*(?:/[\w.-]+)*")


def only_in_a_checkout(text):
    """Files and folders named in a text that are in the repository and not in the wheel."""
    found = []
    for place in PLACE.findall(text):
        place = place.rstrip(".")
        names_a_file = ("/" in place or "." in place) and (ROOT / place).exists()
        if names_a_file and not any((ROOT / place).resolve().is_relative_to(package) for package in PACKAGES):
            found.append(place)
    return found


def messages(path):
    """Texts of a module's code; docstrings only of API functions, which become the help."""
    tree = ast.parse(path.read_text())
    internal = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for before, statement in zip([None, *body], body, strict=False):
                alone = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
                if alone and (before is None or isinstance(before, (ast.Assign, ast.AnnAssign))):
                    internal.add(id(statement.value))
    help_texts = path.parent.name == "api"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (help_texts or id(node) not in internal):
            yield node.value


@pytest.mark.parametrize("text", ["see docs/budgets.md.", "`scripts/demo`", "README.md says", "configs/search"])
def test_what_is_only_in_a_checkout_is_noticed(text):
    assert only_in_a_checkout(text)


@pytest.mark.parametrize("text", ["plans/plan.json", "h.yaml", "moa_search/errors.py", "a/b", "0.25 of docs"])
def test_what_users_have_is_not(text):
    assert not only_in_a_checkout(text)


def test_no_message_names_a_file_of_the_checkout():
    named = {
        f"{path.relative_to(ROOT)}: {place}"
        for package in PACKAGES
        for path in package.rglob("*.py")
        for text in messages(path)
        for place in only_in_a_checkout(text)
    }
    assert not named


@pytest.mark.parametrize(
    ("module", "command"), [(module, name) for module, names in PROGRAMS.items() for name in names]
)
def test_no_help_names_a_file_of_the_checkout(module, command):
    code = f"from moa_search.cli.{module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    assert not only_in_a_checkout(" ".join(done.stdout.split()))
