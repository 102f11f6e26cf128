"""What the tests of kernels share: random inputs, and how far a result may be off.

How far a result may be off, in one paragraph. Let eps be the spacing of the result's type. Of a row with weights
``p_j``, values ``v_j`` and output ``o``, first-order analysis says: an error ``c_j * eps`` of score j moves the output
by ``p_j c_j |v_j - o| * eps`` and the log-sum-exp by ``p_j c_j * eps``; scores are off by about
``(|scale| |q| |k_j| * slope + |s_j|) * eps`` (a product of vectors, then the scale and the soft cap, of derivative
``slope``); weights and output are rounded once each, and normalised by a log-sum-exp that is itself rounded. Their sum
is the *unit* of that very element (`Masked.exactly`). The yardstick is how many units plain torch is off, at most, over
a whole batch of seeds (`Batch`), on the machine at hand; a kernel may be off twice as much, as in FlashAttention's
tests. One problem's own largest error is no yardstick: it is small by luck in some of hundreds of seeds, which ones
depends on the BLAS. In units, errors hardly depend on the problem: over 60 seeds plain torch is 0.3 off in 16 bits and
0.6 in float32, over 240 no more than a tenth more. Statistics of influence have their own units, derived likewise
(`whole_matrices.roundings`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

TRUNCATED = 4
"""Matrix units that multiply 16-bit numbers (AVX-512 BF16, AMX, tensor cores) drop up to two bits of the sums."""

MOST_ELEMENTS = 2**26
"""Of a temporary tensor ``[batch, heads, rows, keys, head_dim]``."""


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn on the CPU, rounded to ``dtype``, on `DEVICE`."""
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


class Exact(NamedTuple):
    """Attention in float64, and the units of its rounding errors (see the module)."""

    output: Tensor
    lse: Tensor
    output_unit: Tensor
    lse_unit: Tensor


@dataclass
class Masked:
    """Attention under an explicit mask.

    Attributes:
        query: ``[batch, heads, queries, head_dim]``, in the type that results are rounded to.
        key: ``[batch, kv_heads, keys, head_dim]``; anything where no query sees it.
        value: As ``key``.
        visible: Boolean ``[batch, kv_heads, queries, keys]``.
        scale: Factor of the scores; ``head_dim ** -0.5`` for None.
        softcap: Bound of the scores, or None.
        sink_logits: ``[heads]``, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    scale: float | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def plainly(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp with products in ``dtype``, as in torch's own attention without a fused kernel."""
        _, weights, value, lse, _ = self._softmax(dtype)
        return weights.to(dtype) @ value, lse

    def exactly(self) -> Exact:
        """The same in float64, with units."""
        scores, weights, value, lse, sizes = self._softmax(torch.float64)
        output = weights @ value
        finite = lse.masked_fill(lse == -torch.inf, 0).abs()
        moved = weights * (sizes + scores.masked_fill(scores == -torch.inf, 0).abs())  # p_j c_j
        unit = weights @ value.abs() + output.abs() * (1 + finite)[..., None]
        step = max(1, MOST_ELEMENTS // max(1, weights[:, :, 0].numel() * value.shape[-1]))
        for top in range(0, weights.shape[2], step):
            rows = slice(top, top + step)
            away = (value[:, :, None] - output[:, :, rows, None]).abs()  # |v_j - o|: [batch, heads, rows, keys, dim]
            unit[:, :, rows] += (moved[:, :, rows, None] @ away)[:, :, :, 0]
        return Exact(output, lse, unit, moved.sum(-1) + 1 + finite)

    def _softmax(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Scores, weights, values, log-sum-exp, and the sizes of the products that scores are made of."""
        group = self.query.shape[1] // self.key.shape[1]
        unread = ~self.visible.any(2)[..., None]
        query = self.query.to(dtype)
        key, value = (
            states.masked_fill(unread, 0).to(dtype).repeat_interleave(group, 1) for states in (self.key, self.value)
        )
        visible = self.visible.repeat_interleave(group, 1)
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        wide = torch.promote_types(dtype, torch.float32)
        scores = ((query @ key.mT) * scale).to(wide)
        sizes = query.norm(dim=-1)[..., None] * key.norm(dim=-1)[..., None, :] * abs(scale)
        if self.softcap is not None:
            bounded = torch.tanh(scores / self.softcap)
            scores, sizes = self.softcap * bounded, sizes * (1 - bounded**2)
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        if self.sink_logits is not None:
            lse = torch.logaddexp(lse, self.sink_logits.to(wide)[:, None])
        weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
        return scores, weights, value, lse, sizes


class Batch:
    """How many units plain torch is off, at most, over many problems of each type.

    Args:
        problems: Makes them; called once, when the first result is measured.
    """

    def __init__(self, problems: Callable[[], Iterable[Masked]]) -> None:
        self._problems = problems
        self._worst: dict[torch.dtype, tuple[float, float]] = {}

    def worst(self, dtype: torch.dtype) -> tuple[float, float]:
        """Of the output in ``dtype``, and of the log-sum-exp in float32."""
        if not self._worst:
            for problem in self._problems():
                exact = problem.exactly()
                kind = problem.query.dtype
                output = units_off(problem.plainly(kind)[0], exact.output, exact.output_unit)
                lse = units_off(problem.plainly(torch.float32)[1], exact.lse, exact.lse_unit)
                before = self._worst.get(kind, (0.0, 0.0))
                self._worst[kind] = max(before[0], output), max(before[1], lse)
        return self._worst[dtype]


def units_off(found: Tensor, exact: Tensor, unit: Tensor) -> float:
    """The largest error, in units of ``found``'s type; infinite where what is infinite or 0 without doubt isn't so."""
    same = found.double() == exact  # infinities, and rows that see nothing
    error = (found.double() - exact).abs().masked_fill(same, 0)
    of_type = torch.finfo(found.dtype)
    # No number of the type is nearer than half its smallest one.
    off = (error / (of_type.eps * unit).clamp(min=of_type.eps * of_type.smallest_normal)).masked_fill(same, 0)
    return float(off.nan_to_num(nan=torch.inf).max()) if off.numel() else 0.0


def assert_within(found: tuple[Tensor, Tensor], problem: Masked, batch: Batch, note: object = "") -> None:
    """At most twice as many units off as plain torch in the batch, every element of output and log-sum-exp.

    Args:
        found: What a kernel gave, ``[batch, heads, queries, head_dim]`` and ``[batch, heads, queries]``.
        problem: What it was given.
        batch: Problems like this one.
        note: Shown when it fails.
    """
    exact = problem.exactly()
    output, lse = found
    assert output.dtype == problem.query.dtype
    assert lse.dtype == torch.float32
    worst, worst_lse = batch.worst(output.dtype)
    if output.element_size() < lse.element_size():
        worst_lse *= TRUNCATED  # plain torch's is from products in float32
    assert output.shape == exact.output.shape, note
    assert lse.shape == exact.lse.shape, note
    off = units_off(output, exact.output, exact.output_unit)
    assert off <= 2 * worst, f"{note}: output is {off:.3g} units off, plain torch {worst:.3g} in its batch"
    off = units_off(lse, exact.lse, exact.lse_unit)
    assert off <= 2 * worst_lse, f"{note}: log-sum-exp is {off:.3g} units off, plain torch {worst_lse:.3g} in its batch"
