from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.interpreter import patched_once


@pytest.fixture(autouse=True, scope="session")
def interpreter_patched_once() -> Iterator[None]:
    with patched_once():
        yield
