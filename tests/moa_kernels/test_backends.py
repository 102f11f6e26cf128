"""Who runs what, and what is said where Triton can't."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from moa_kernels import backends
from moa_kernels.backends import BackendUnavailableError, choose


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto means Triton there")
def test_auto_is_torch_without_a_gpu_even_when_interpreting():
    assert choose("auto", torch.zeros(1), head_dim=64) == "torch"
    assert choose("triton", torch.zeros(1), head_dim=64) == "triton"


@pytest.mark.parametrize(
    ("tensors", "head_dim", "reason"),
    [
        ([torch.zeros(1, dtype=torch.float64)], 64, "float64"),
        ([torch.zeros(1), torch.zeros(1, dtype=torch.float16)], 64, "differ in type"),
        ([torch.zeros(1), torch.zeros(1, device="meta")], 64, "several devices"),
        ([torch.zeros(1)], 257, "head_dim is 257"),
        ([torch.zeros(1, requires_grad=True)], 64, "no gradient"),
    ],
)
def test_what_kernels_cannot_do_is_an_error_for_triton_and_torch_for_auto(tensors, head_dim, reason):
    with pytest.raises(BackendUnavailableError, match=reason):
        choose("triton", *tensors, head_dim=head_dim)
    assert choose("auto", *tensors, head_dim=head_dim) == "torch"
    assert choose("torch", *tensors, head_dim=head_dim) == "torch"


def test_a_cpu_without_the_interpreter_is_told_so(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    with pytest.raises(BackendUnavailableError, match="need a CUDA device, not 'cpu'"):
        choose("triton", torch.zeros(1), head_dim=64)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="Triton isn't installed"):
        choose("triton", torch.zeros(1), head_dim=64)


def test_no_public_module_loads_triton():
    """On a laptop without Triton everything imports and runs on the references."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, moa_kernels.prefill, moa_kernels.decode, moa_kernels.append, moa_kernels.influence\n"
        "from moa_kernels.spans import HeadSpans\n"
        "x = torch.randn(1, 1, 4, 8)\n"
        "print(moa_kernels.prefill.span_prefill(x, x, x, HeadSpans.dense(1))[0].shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 1, 4, 8])"
