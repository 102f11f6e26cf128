"""Kernels compile for GPUs that aren't here: in registers alone, onto tensor cores, with loads in flight."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest

from .compiling import CASES, reports

ARCHS = ("sm_80", "sm_90")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]


@pytest.fixture(scope="module")
def all_reports():
    keys = list(product(CASES, ARCHS))
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(keys, pool.map(lambda key: reports(*key), keys), strict=True))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", CASES)
def test_no_register_spills_and_tensor_cores_where_there_are_products(all_reports, kernel, arch):
    found = all_reports[kernel, arch]
    assert found
    for report in found:
        assert report["spills"] <= report["most_spills"], report
        assert report["local"] == 0, report
        if report["needs_tensor_cores"]:
            assert report["tensor_core_instructions"] > 0, report
            assert report["asynchronous_copies"] > 0, report
