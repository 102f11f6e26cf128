"""Who runs what, and what is said where Triton can't."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from moa_kernels import backends
from moa_kernels.append import append_tokens
from moa_kernels.backends import BackendUnavailableError, choose
from moa_kernels.cpu.library import unavailable
from moa_kernels.decode import span_decode
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans


def test_auto_is_never_triton_on_a_cpu_even_when_interpreting():
    assert choose("auto", torch.zeros(1), head_dim=64) in ("cpu", "torch")
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


@pytest.fixture
def forgetful(monkeypatch):
    """Nothing is remembered from earlier tests, nor for later ones."""
    remembered = (backends._triton_installed, backends._too_old, backends._log_once)
    for function in remembered:
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def pretend_gpu(forgetful):
    """Makes what `choose` asks of tensors on an H100; it reads no numbers."""
    forgetful.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    forgetful.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")

    def tensor(dtype=torch.bfloat16, requires_grad=False, index=0):
        return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, requires_grad=requires_grad)

    return tensor


def test_a_missing_triton_is_named(forgetful):
    forgetful.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="Triton isn't installed"):
        choose("triton", torch.zeros(1), head_dim=64)


def test_triton_is_looked_for_once_on_a_gpu_and_never_on_a_cpu(pretend_gpu, forgetful):
    searched = []
    forgetful.setattr(backends.importlib.util, "find_spec", lambda name: searched.append(name))
    for _ in range(50):
        assert choose("auto", torch.zeros(1), head_dim=64) != "triton"
    assert searched == []
    for _ in range(50):
        assert choose("auto", pretend_gpu(), head_dim=64) == "torch"
    assert searched == ["triton"]


def test_a_decoding_step_searches_no_path(forgetful):
    layout, spans = RingLayout((8, 4), (1, 1)), HeadSpans(((1, 5, 0, 0), (1, 3, 0, 0)))
    keys, values, lens = torch.zeros(1, 12, 16), torch.zeros(1, 12, 16), torch.tensor([3])
    searched = []
    find_spec = backends.importlib.util.find_spec
    forgetful.setattr(backends.importlib.util, "find_spec", lambda *names: searched.append(names) or find_spec(*names))
    for _ in range(5):
        append_tokens(keys, values, torch.ones(1, 2, 1, 16), torch.ones(1, 2, 1, 16), lens, layout)
        span_decode(torch.ones(1, 4, 1, 16), keys, values, lens + 1, layout, spans)
    assert searched == []


@pytest.mark.parametrize(
    ("tensors", "head_dim", "reason"),
    [
        ([{"dtype": torch.float64}], 64, "take float16, bfloat16, float32 here, not float64"),
        ([{}], 512, "head_dim is 512"),
        ([{}, {"index": 1}], 64, "several devices"),
        ([{}, {"requires_grad": True}], 64, "no gradient"),
    ],
)
def test_auto_says_once_why_torch_runs_on_a_gpu(pretend_gpu, caplog, tensors, head_dim, reason):
    for _ in range(3):
        assert choose("auto", *(pretend_gpu(**options) for options in tensors), head_dim=head_dim) == "torch"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "torch runs instead of triton" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(("lacking", "reason"), [("triton", "isn't installed"), ("age", "H100 is older than compute")])
def test_auto_says_once_what_the_machine_lacks(pretend_gpu, forgetful, caplog, lacking, reason):
    if lacking == "triton":
        forgetful.setattr(backends.importlib.util, "find_spec", lambda name: None)
    else:
        forgetful.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        assert choose("auto", pretend_gpu(dtype), head_dim=64) == "torch"
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_another_reason_is_said_too(pretend_gpu, caplog):
    for head_dim in (300, 400, 300):
        choose("auto", pretend_gpu(), head_dim=head_dim)
    assert len(caplog.records) == 2


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_nothing_is_said_where_nothing_is_amiss(pretend_gpu, caplog):
    choose("auto", pretend_gpu(), head_dim=64)
    choose("torch", pretend_gpu(torch.float64), head_dim=64)
    choose("auto", torch.zeros(1), head_dim=64)  # a CPU has a library of its own
    assert not caplog.records


def test_what_was_chosen_is_not_questioned_again(pretend_gpu, forgetful):
    chosen = choose("triton", pretend_gpu(), head_dim=64)
    assert chosen == "triton"
    forgetful.setattr(backends, "OBSTACLES", {})
    assert choose(chosen, pretend_gpu(), head_dim=64) is chosen


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
