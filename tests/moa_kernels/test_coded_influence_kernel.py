"""Influence over coded keys and values in Triton against whole N x N matrices in float64."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from moa_kernels.backends import BackendUnavailableError
from moa_kernels.coded_influence import CODED_STATISTICS, coded_changes
from moa_kernels.launch import LaunchConfig, overridden
from torch import Tensor

from .seeds import seeds
from .test_influence_kernel import poisoned, problem, uninitialised_memory_is_nan
from .whole_matrices import by_bucket, windowed_attention
from .yardstick import DEVICE, units_off

pytest.importorskip("triton")

__all__ = ["uninitialised_memory_is_nan"]

CASES, DEFAULT = 120, 17


@dataclass
class Coded:
    """Inputs of one call, inside memory full of NaN."""

    tensors: list[Tensor]
    options: dict[str, Any]
    config: LaunchConfig

    def run(self, impl: str = "triton") -> dict[str, Tensor]:
        with overridden("influence", self.config), overridden("coded_influence", self.config):
            return coded_changes(*self.tensors, **self.options, impl=impl)

    def by_matrices(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The changes, and the units of float32's roundings in them.

        A row's ``dO . o`` is off as its scores, gains and weights are rounded: each term of its sum by its own size,
        times one and the size of its score. Squared, that counts as often as the delta is large.
        """
        query, keys, values, grad_out = (tensor.to(dtype).cpu() for tensor in self.tensors)
        logits = self.options["sink_logits"]
        options = self.options | {"sink_logits": None if logits is None else logits.to(dtype).cpu()}
        group, rows = len(query) // keys.shape[1], (options["row_buckets"], options["bucket_rows"])
        whole = options | {"windows": (query.shape[1],)}

        def gains(key: Tensor, value: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
            """``dO . o`` of every window and row, and its unit."""
            attention, sizes = windowed_attention(query, key, **options)  # [window, heads, N, N]
            value = value.repeat_interleave(group, 0)
            terms = grad_out.abs() @ value.abs().mT
            return (grad_out * (attention @ value)).sum(-1), (attention * terms * (1 + sizes)).sum(-1)

        def totals(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            (gain, unit), (plain, plain_unit) = gains(key, value, options), gains(keys[0], values[0], whole)
            delta, unit = gain - plain, unit + plain_unit
            squared_unit = 2 * delta.abs() * unit + torch.finfo(torch.float32).eps * unit**2
            found = [by_bucket(each, group, *rows) for each in (delta**2, delta, squared_unit, unit)]
            return torch.stack(found[:2]), torch.stack(found[2:])

        seen = [(key, values[0]) for key in keys[1:]] + [(keys[0], value) for value in values[1:]]
        (before, unit), coded = totals(keys[0], values[0]), [totals(*pair) for pair in seen]
        changes = torch.stack([found - before for found, _ in coded], -1)
        units = torch.stack([own + unit for _, own in coded], -1)
        return dict(zip(CODED_STATISTICS, changes, strict=True)), dict(zip(CODED_STATISTICS, units, strict=True))


def coded_problem(seed: int) -> Coded:
    """A problem of `test_influence_kernel`, with codecs of up to a few times what 2 bits do; half as profiles ask."""
    case, draw, generator = problem(seed), random.Random(seed), torch.Generator().manual_seed(seed)
    query, key, value, grad_out = case.tensors
    if draw.random() < 0.5:
        case.options |= {"windows": (query.shape[1],), "row_buckets": 1, "bucket_rows": query.shape[1]}
    counts = draw.choice(((3, 3), (3, 3), (1, 2), (2, 0), (0, 1), (4, 4), (5, 2)))
    states = []
    for plain, count in zip((key, value), counts, strict=True):
        sizes = torch.tensor([draw.choice((0.01, 0.1, 0.5, 2.0)) for _ in range(count)])
        noise = torch.randn(count, *plain.shape, generator=generator) * sizes[:, None, None, None]
        noise[:, :, : case.options["sink"]] = 0
        seen = torch.cat([plain[None].cpu(), (plain.cpu() + noise).to(plain.dtype)])
        part = poisoned(seen.flatten(0, 1), draw.randint(0, 5), draw.random() < 0.5)
        states.append(part.unflatten(0, (count + 1, -1)))
    return Coded([query, *states, grad_out], case.options, case.config)


@functools.cache
def yardstick() -> dict[str, float]:
    """For each statistic, how many units float32 matrices are off, at most, over a batch of seeds (see `yardstick`)."""
    worst = dict.fromkeys(CODED_STATISTICS, 0.0)
    for seed in range(DEFAULT):
        case = coded_problem(seed)
        (exact, unit), (plain, _) = case.by_matrices(torch.float64), case.by_matrices(torch.float32)
        worst = {name: max(worst[name], units_off(plain[name], exact[name], unit[name])) for name in worst}
    return worst


def assert_close(found: dict[str, Tensor], case: Coded) -> None:
    exact, unit = case.by_matrices(torch.float64)
    assert tuple(found) == CODED_STATISTICS
    for name in CODED_STATISTICS:
        assert found[name].dtype == torch.float32
        assert found[name].shape == exact[name].shape
        off, worst = units_off(found[name].cpu(), exact[name], unit[name]), yardstick()[name]
        assert off <= 2 * worst, (
            f"{name} is {off:.3g} units off, plain torch {worst:.3g} in its batch: {case.options}, {case.config}"
        )


@pytest.mark.parametrize("seed", seeds(CASES, DEFAULT))
def test_random_problems(seed: int) -> None:
    case = coded_problem(seed)
    assert_close(case.run(), case)


def test_runs_are_equal_to_the_bit() -> None:
    case = coded_problem(37)
    first, second = case.run(), case.run()
    for name in CODED_STATISTICS:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("windows", [(50,), (16, 32, 50)])
def test_a_codec_that_changes_nothing_costs_exactly_nothing(windows: tuple[int, ...]) -> None:
    """Also where the codecs of a side take several launches."""
    query, key, value, grad_out = torch.randn(4, 2, 50, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    keys, values = key.expand(5, -1, -1, -1).clone(), value.expand(4, -1, -1, -1).clone()
    keys[2, :, 30], values[3, :, 30] = 3.0, 3.0
    options = {"windows": windows, "row_buckets": 2, "bucket_rows": 25, "sink": 4, "scale": 0.25}
    options |= {"softcap": None, "sink_logits": None}
    found = Coded([query, keys, values, grad_out], options, LaunchConfig(32, 16, 4, 2)).run()
    changed = [1, 6]  # of four key codecs, then three value codecs
    for statistics in found.values():
        assert (statistics[:, 1][..., changed] != 0).all(), "rows of the second bucket see token 30"
        assert (statistics[:, 0] == 0).all()
        others = [codec for codec in range(7) if codec not in changed]
        assert (statistics[..., others] == 0).all()


def test_any_strides() -> None:
    case = coded_problem(37)
    expected = case.run()
    case.tensors = [tensor.mT.contiguous().mT for tensor in case.tensors]
    assert all(tensor.stride(-1) != 1 for tensor in case.tensors)
    found = case.run()
    for name in CODED_STATISTICS:
        assert torch.equal(found[name], expected[name])


def test_heads_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(*shape, 30, 16, generator=generator).to(DEVICE) for shape in ((6,), (2, 3), (2, 3), (6,))]
    options = {"windows": (16,), "row_buckets": 2, "bucket_rows": 15, "sink": 2, "scale": 0.25, "softcap": None}
    sinks = torch.randn(6, generator=generator).to(DEVICE)
    case = Coded(states, options | {"sink_logits": sinks}, LaunchConfig(32, 16, 4, 2))
    expected = case.run()
    monkeypatch.setattr("moa_kernels.influence.launch.MOST_BYTES", 1)
    found = case.run()
    for name in CODED_STATISTICS:
        assert torch.equal(found[name], expected[name])


def test_scores_beyond_what_exponentials_hold() -> None:
    """Coded scores may lie far from plain ones: each codec's largest one counts for itself."""
    query, key, value, grad_out = torch.randn(4, 1, 40, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    keys, values = torch.stack([key, key - 300 * query.mean(1, keepdim=True), 50 * key]), value.expand(2, -1, -1, -1)
    options = {"windows": (40,), "row_buckets": 1, "bucket_rows": 40, "sink": 0, "scale": 5.0}
    case = Coded(
        [query, keys, values, grad_out], options | {"softcap": None, "sink_logits": None}, LaunchConfig(32, 16, 4, 2)
    )
    assert_close(case.run(), case)


def test_torch_alone_takes_double_precision() -> None:
    case = coded_problem(37)
    case.tensors = [tensor.double() for tensor in case.tensors]
    assert case.run("auto")["squared"].dtype == torch.float64
    with pytest.raises(BackendUnavailableError, match="float64"):
        case.run("triton")


def test_importing_loads_no_triton() -> None:
    script = "import sys, moa_kernels.coded_influence; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
