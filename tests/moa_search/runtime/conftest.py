from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moa_search import Plan
from moa_search.runtime import apply_plan
from tests.interpreter import patched_once

from .explicit import tiny_model, tiny_plan


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


@pytest.fixture(scope="module")
def plan() -> Plan:
    return tiny_plan(tiny_model())


@pytest.fixture(scope="module")
def model(plan: Plan) -> torch.nn.Module:
    return apply_plan(tiny_model(), plan)
