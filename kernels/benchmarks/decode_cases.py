"""Decoding over ragged caches beside a plain copy of as many bytes and torch's fused attention; appending to them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from moa_kernels.append import append_tokens
from moa_kernels.decode import span_decode
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans
from plans import BETAS_256
from timing import Case, Run
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

DIM, GROUP, KV_HEADS, BATCH, SINK = 128, 4, 8, 4, 64
MEGABYTES = (16, 64, 256, 1024)


def cases(lengths: list[int], device: torch.device) -> Iterator[Case]:
    """Caches of several sizes, heads alike and unlike; lengths play no part, bytes do."""
    tiny = device.type != "cuda"
    batch = 1 if tiny else BATCH
    for megabytes in (2,) if tiny else MEGABYTES:
        dtype = torch.float32 if tiny else torch.bfloat16
        slots = int(megabytes * 2**20) // (2 * DIM * dtype.itemsize * batch)
        for plan, betas in (("uniform", (256,) * KV_HEADS), ("ragged", BETAS_256["25 %"])):
            capacities = tuple(slots * beta // sum(betas) // 16 * 16 for beta in betas)
            yield _case(f"{plan}, {megabytes} MiB", capacities, batch, dtype, device)
    yield _append_case(tuple([2048] * KV_HEADS), torch.float32 if tiny else torch.bfloat16, device)


def _case(name: str, capacities: tuple[int, ...], batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    length = max(capacities)
    layout = RingLayout(capacities, (min(SINK, min(capacities) // 2),) * KV_HEADS)
    sink = layout.sinks[0]
    # The newest window of every head is what its ring holds: nothing is read in vain.
    spans = HeadSpans(tuple((sink, capacity, 0, 0) for capacity in capacities))
    generator = torch.Generator(device).manual_seed(length)
    randn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    query = randn(batch, GROUP * KV_HEADS, 1, DIM)
    keys, values = randn(batch, layout.slots, DIM), randn(batch, layout.slots, DIM)
    lens = torch.full((batch,), length, device=device)
    run = partial(span_decode, query, keys, values, lens, layout, spans, impl="triton")
    references = {}
    if len(set(capacities)) == 1:
        dense = [states.view(batch, KV_HEADS, length, DIM) for states in (keys, values)]
        references["SDPA dense, as many bytes"] = partial(_dense, query, *dense)
    elif device.type == "cuda" and length * KV_HEADS * batch * DIM * 4 < 2**34:
        whole = [randn(batch, KV_HEADS, length, DIM) for _ in range(2)]
        references["SDPA dense, as many tokens"] = partial(_dense, query, *whole)
    return Case(
        kernel="decode",
        name=name,
        shapes={
            "query": list(query.shape),
            "capacities": list(capacities),
            "dtype": str(dtype).split(".")[1],
        },
        run=run,
        verify=partial(_verify, query, keys, values, layout, run),
        references=references,
        bytes=keys.nbytes + values.nbytes,
    )


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Run:
    return partial(scaled_dot_product_attention, query, key, value, enable_gqa=True)


def _verify(query: Tensor, keys: Tensor, values: Tensor, layout: RingLayout, run: Run) -> None:
    """Every head's slots are all attended: one softmax over them in float64, in whatever order they lie."""
    out, lse = run()
    for head, (offset, capacity) in enumerate(zip(layout.offsets, layout.capacities, strict=True)):
        slots, members = slice(offset, offset + capacity), slice(head * GROUP, (head + 1) * GROUP)
        scores = query[:, members, 0].double() @ keys[:, slots].double().mT * DIM**-0.5
        exact = scores.softmax(-1) @ values[:, slots].double()
        error = float((out[:, members, 0].double() - exact).norm() / exact.norm())
        assert error < 1e-2, f"head {head}: relative error {error:.2e}"
        assert (lse[:, members, 0] - scores.logsumexp(-1)).abs().max() < 1e-3, f"head {head}: log-sum-exp"


def _append_case(capacities: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    """One new token for each of 64 samples."""
    layout, batch = RingLayout(capacities, (SINK,) * KV_HEADS), 64 if device.type == "cuda" else 2
    keys, values = torch.zeros(2, batch, layout.slots, DIM, device=device, dtype=dtype)
    new_keys, new_values = torch.randn(2, batch, KV_HEADS, 1, DIM, device=device).to(dtype)
    lens = torch.arange(batch, device=device) * 100
    slot = torch.stack([layout.slot(head, lens) for head in range(KV_HEADS)], 1)
    sample = torch.arange(batch, device=device)[:, None]

    def run() -> None:
        append_tokens(keys, values, new_keys, new_values, lens, layout, impl="triton")

    def scatter() -> None:
        keys[sample, slot] = new_keys[:, :, 0]
        values[sample, slot] = new_values[:, :, 0]

    def verify() -> None:
        run()
        assert torch.equal(keys[sample, slot], new_keys[:, :, 0])
        assert torch.equal(values[sample, slot], new_values[:, :, 0])
        assert int((keys != 0).any(-1).sum()) == batch * KV_HEADS

    return Case(
        kernel="append",
        name=f"one token, {batch} samples",
        shapes={"new": list(new_keys.shape), "capacities": list(capacities), "dtype": str(dtype).split(".")[1]},
        run=run,
        verify=verify,
        references={"index_put": lambda: scatter},
    )
