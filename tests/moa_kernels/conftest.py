"""Kernels run in Triton's interpreter where there is no GPU; it must be asked for before the first import of Triton."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def interpreter_patched_once() -> Iterator[None]:
    """The interpreter replaces Triton's language again in every call of a device function: half of its time.

    Once per launch and module will do.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module, outermost = id(function.__globals__), not patched
        if module in patched:
            return SimpleNamespace(restore=lambda: None)
        scope = patch(function)
        patched.add(module)

        def restore() -> None:
            if outermost:
                patched.clear()
            scope.restore()

        return SimpleNamespace(restore=restore)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        yield
