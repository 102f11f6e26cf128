from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import moa_search

HEAVY = {"torch", "transformers", "matplotlib", "pandas", "highspy"}


def modules_of(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    paths = list(spec.submodule_search_locations)
    return [package, *(info.name for info in pkgutil.walk_packages(paths, f"{package}."))]


MODULES = [*modules_of("moa_search"), *modules_of("moa_kernels")]


FACES = [name for name in MODULES if importlib.util.find_spec(name).submodule_search_locations is not None]
"""Packages; modules inside them need no `__all__`."""


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after ``statement``."""
    script = f"import json, sys; {statement}; print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        pytest.skip("needs triton")


def defined_in(module: ModuleType) -> set[str]:
    """Public names that a module's own statements define."""
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
    return {name for name in names if not name.startswith("_")}


def isort_order(name: str) -> tuple[int, str]:
    """Constants, classes, the rest, as ruff sorts ``__all__``."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", FACES)
def test_a_package_says_what_is_public_sorted(name: str) -> None:
    module = imported(name)
    names = getattr(module, "__all__", None)
    if names is None:
        assert not defined_in(module), f"{name} has no __all__"
        return
    assert list(names) == sorted(set(names), key=isort_order)
    for public in names:
        assert hasattr(module, public), f"{name}.{public}"


@pytest.mark.parametrize("name", moa_search.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(moa_search, name) is not None


def test_public_names_are_listed_once() -> None:
    assert set(moa_search.__all__) == {*moa_search._HOMES, "__version__"}
    assert dir(moa_search) == sorted(moa_search.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'aply_plan'"):
        _ = moa_search.aply_plan


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import moa_search") & HEAVY


@pytest.mark.parametrize("name", ["Plan", "Profile", "SpanRule"])
def test_files_and_rules_need_no_model_library(name: str) -> None:
    assert not loaded_after(f"from moa_search import {name}") & HEAVY


def test_the_search_needs_no_model_library() -> None:
    searching = [name for name in MODULES if name.split(".")[:2] == ["moa_search", "search"]]
    loaded = loaded_after(f"import {', '.join(searching)}")
    assert not loaded & {"torch", "transformers", "moa_kernels"}
