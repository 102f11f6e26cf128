"""The profiling kernels against whole N x N matrices in float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from moa_kernels.backends import BackendUnavailableError
from moa_kernels.influence import STATISTICS, influence_statistics
from moa_kernels.influence.launch import tiling
from moa_kernels.launch import LaunchConfig, overridden
from torch import Tensor

from .seeds import DEFAULT_SEEDS, seeds
from .whole_matrices import direct, roundings
from .yardstick import DEVICE, DTYPES, units_off

pytest.importorskip("triton")

CASES = 240


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Problem:
    """Inputs of one call, inside memory full of NaN."""

    tensors: list[Tensor]
    options: dict[str, Any]
    config: LaunchConfig

    def run(self, impl: str = "triton") -> dict[str, Tensor]:
        with overridden("influence", self.config):
            return influence_statistics(*self.tensors, **self.options, impl=impl)

    def exactly(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The statistics in float64, and the units of float32's roundings in them."""
        arguments, options = self._as(torch.float64)
        return direct(*arguments, **options), roundings(*arguments, **options)

    def plainly(self) -> dict[str, Tensor]:
        """The statistics by whole matrices in float32."""
        arguments, options = self._as(torch.float32)
        return direct(*arguments, **options)

    def _as(self, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
        logits = self.options["sink_logits"]
        options = self.options | {"sink_logits": None if logits is None else logits.to(dtype).cpu()}
        return [tensor.to(dtype).cpu() for tensor in self.tensors], options


def poisoned(values: Tensor, spare: int, by_row: bool) -> Tensor:
    """The same numbers as a part of a larger tensor, the rest of which is NaN; rows or heads outermost."""
    heads, n, width = values.shape
    if by_row:
        room = values.new_full((n + spare, heads, width + spare), float("nan")).transpose(0, 1)
    else:
        room = values.new_full((heads, n + spare, width + spare), float("nan"))
    part = room[:, spare // 2 : spare // 2 + n, spare // 2 : spare // 2 + width]
    part.copy_(values)
    return part.to(DEVICE)


def problem(seed: int) -> Problem:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    group = draw.choice((1, 1, 3, 8))
    n = 1 + int(draw.choice((5, 60, 130, 160) if group == 1 else (5, 40)) * draw.random())
    kv_heads = 2 if group < 8 and n < 40 and draw.random() < 0.5 else 1
    dtype, head_dim = draw.choice(DTYPES), draw.choice((8, 16, 24, 40, 64))
    unit = draw.choice([unit for unit in (16, 16, 32, 48, 64, 1, 6) if unit < n] or [1, 16])
    ends = {unit * draw.randint(1, max(1, (n - 1) // unit)) for _ in range(draw.randint(1, 6))}
    windows = sorted(ends | set(draw.choice(([], [n], [n + 5]))))
    # The interpreter takes milliseconds per program, of which each bucket of each head has at least one.
    row_buckets = draw.choice([count for count in (1, 1, 2, 3, 8, 32) if count * group * kv_heads <= 32 or count == 1])
    sinks = torch.randn(group * kv_heads, generator=generator) * 2 if draw.random() < 0.3 else None
    shapes = [(group * kv_heads, n, head_dim), *[(kv_heads, n, head_dim)] * 2, (group * kv_heads, n, head_dim)]
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    block_m = draw.choice((16, 32, 64, 128) if n * group * kv_heads < 100 else (64, 128))
    return Problem(
        [poisoned(tensor, draw.randint(0, 5), draw.random() < 0.5) for tensor in tensors],
        {
            "windows": tuple(windows),
            "row_buckets": row_buckets,
            "bucket_rows": -(-n // row_buckets) + draw.choice((0, 0, 3)),
            "sink": draw.choice((0, 0, 1, 4, 7, 16, 37, n + 3)),
            "scale": draw.choice((0.2, 0.5, 1.0)) * (8 / head_dim) ** 0.5,
            "softcap": draw.choice((None, None, 3.0, 20.0)),
            "sink_logits": None if sinks is None else sinks.to(dtype).to(DEVICE),
        },
        LaunchConfig(block_m, draw.choice((16, 32, 64)), 4, 2),
    )


@functools.cache
def yardstick() -> dict[str, float]:
    """For each statistic, how many units float32 matrices are off, at most, over a batch of seeds (see `yardstick`)."""
    worst = dict.fromkeys(STATISTICS, 0.0)
    for seed in range(DEFAULT_SEEDS):
        case = problem(seed)
        exact, unit = case.exactly()
        plain = case.plainly()
        worst = {name: max(worst[name], units_off(plain[name], exact[name], unit[name])) for name in STATISTICS}
    return worst


def assert_close(found: dict[str, Tensor], case: Problem) -> None:
    exact, unit = case.exactly()
    assert tuple(found) == STATISTICS
    for name in STATISTICS:
        assert found[name].dtype == torch.float32
        assert found[name].shape == exact[name].shape
        off, worst = units_off(found[name].cpu(), exact[name], unit[name]), yardstick()[name]
        assert off <= 2 * worst, (
            f"{name} is {off:.3g} units off, plain torch {worst:.3g} in its batch: {case.options}, {case.config}"
        )


@pytest.mark.parametrize("seed", seeds(CASES))
def test_random_problems(seed: int) -> None:
    case = problem(seed)
    assert_close(case.run(), case)


@pytest.mark.parametrize(("count", "least"), [(CASES, 20), (DEFAULT_SEEDS, 5)])
def test_random_problems_take_both_kernels(count: int, least: int) -> None:
    taken = []
    for seed in range(count):
        case = problem(seed)
        shorter = [window for window in case.options["windows"] if window < case.tensors[0].shape[1]]
        if shorter:
            cut = tiling(case.config, shorter, case.options["bucket_rows"])
            taken.append((cut.aligned, cut.groups > 1))
    assert min(taken.count(kind) for kind in ((True, False), (True, True), (False, False))) >= least, Counter(taken)


@pytest.mark.parametrize("seed", [1, 5])
def test_runs_are_equal_to_the_bit(seed: int) -> None:
    case = problem(seed)
    first, second = case.run(), case.run()
    for name in STATISTICS:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("windows", [(16, 96, 112), (10, 96, 112)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_whole_windows_cost_exactly_nothing(windows: tuple[int, ...], has_sinks: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(heads, 112, 16, generator=generator).to(DEVICE) for heads in (4, 2, 2, 4)]
    sinks = torch.randn(4, generator=generator).to(DEVICE) if has_sinks else None
    options = {"windows": windows, "row_buckets": 7, "bucket_rows": 16, "sink": 16, "scale": 0.25, "softcap": None}
    case = Problem(tensors, options | {"sink_logits": sinks}, LaunchConfig(32, 16, 4, 2))
    found, exact = case.run(), case.exactly()[0]
    for name in ("squared", "signed", "absolute", "elementwise"):
        assert (found[name][..., 1:] == 0).all(), f"{name}: sink 16 and window 96 see all 112 keys"
        assert (found[name][..., -1, 0].abs() > 0).all(), name
    if not has_sinks:
        assert (found["recall"][..., 1:] == 32).all(), "each of 16 rows of 2 heads keeps all of its attention"
    torch.testing.assert_close(found["recall"].cpu(), exact["recall"].float())


def test_any_strides() -> None:
    case = problem(7)
    expected = case.run()
    case.tensors = [tensor.mT.contiguous().mT for tensor in case.tensors]
    assert all(tensor.stride(-1) != 1 for tensor in case.tensors)
    found = case.run()
    for name in STATISTICS:
        assert torch.equal(found[name], expected[name])


def test_heads_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(heads, 50, 16, generator=generator).to(DEVICE) for heads in (6, 3, 3, 6)]
    options = {"windows": (16, 32), "row_buckets": 2, "bucket_rows": 25, "sink": 2, "scale": 0.25, "softcap": None}
    sinks = torch.randn(6, generator=generator).to(DEVICE)
    case = Problem(tensors, options | {"sink_logits": sinks}, LaunchConfig(32, 16, 4, 2))
    expected = case.run()
    monkeypatch.setattr("moa_kernels.influence.launch.MOST_BYTES", 1)
    found = case.run()
    for name in STATISTICS:
        assert torch.equal(found[name], expected[name])


def test_operator_keeps_its_promises() -> None:
    case = problem(11)
    sizes = [case.options[name] for name in ("windows", "row_buckets", "bucket_rows", "sink", "scale", "softcap")]
    for impl in ("torch", "triton"):
        arguments = (*case.tensors, *sizes, case.options["sink_logits"], impl)
        torch.library.opcheck(torch.ops.moa_kernels.influence.default, arguments)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_as_one_graph(impl: str) -> None:
    case = problem(11)
    expected = case.run(impl)
    compiled = torch.compile(influence_statistics, fullgraph=True, backend="aot_eager")
    with overridden("influence", case.config):
        found = compiled(*case.tensors, **case.options, impl=impl)
    for name in STATISTICS:
        assert torch.equal(found[name], expected[name])


def test_torch_alone_takes_double_precision() -> None:
    case = problem(11)
    case.tensors = [tensor.double() for tensor in case.tensors]
    assert case.run("auto")["squared"].dtype == torch.float64
    with pytest.raises(BackendUnavailableError, match="float64"):
        case.run("triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": (16, 8)}, "increasing"),
        ({"windows": (0, 8)}, "positive"),
        ({"bucket_rows": 1}, "don't hold"),
        ({"sink": -1}, "negative"),
        ({"sink_logits": torch.zeros(99)}, "sink_logits"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    case = problem(11)
    case.options |= change
    with pytest.raises(ValueError, match=message):
        case.run()


def test_importing_loads_no_triton() -> None:
    script = "import sys, moa_kernels.influence; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
