from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.interpreter import patched_once


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Tiny tensors run many times faster on one thread than on cores that others use too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="package")
def interpreter_patched_once() -> Iterator[None]:
    with patched_once():
        yield
