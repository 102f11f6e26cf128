"""Kernels run in Triton's interpreter where there is no GPU; `ask_for_it` comes before their first import."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def ask_for_it() -> None:
    """Have kernels interpreted, unless there is a GPU."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@contextlib.contextmanager
def patched_once() -> Iterator[None]:
    """Have the interpreter replace Triton's language once per launch and module.

    It does so again in every call of a device function: half of its time.
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
