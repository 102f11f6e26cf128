"""Decoding over codes beside a plain copy of as many bytes, and beside 16 bits at equal spans; appending to them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from moa_kernels.coded import append_codes, decode_codes
from moa_kernels.codes import Transform
from moa_kernels.codes.storage import CodeLayout, Stored
from moa_kernels.codes.turns import Turns
from moa_kernels.decode import span_decode
from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans
from timing import Case, Run

DIM, GROUP, KV_HEADS, BATCH, SINK = 128, 4, 8, 4, 16
TIERS = {
    "8 bits": ((8, 8),) * KV_HEADS,
    "4 bits": ((4, 4),) * KV_HEADS,
    "2 bits": ((2, 2),) * KV_HEADS,
    "8 to 2 bits": ((8, 8), (8, 4), (4, 4), (4, 4), (4, 2), (2, 2), (2, 2), (2, 2)),
}
"""Bits of keys and values, by KV head."""


def cases(lengths: list[int], device: torch.device) -> Iterator[Case]:
    """Spans of some lengths, which all heads have, at several tiers."""
    tiny = device.type != "cuda"
    for length in (40,) if tiny else (4096, 32768):
        for name, tiers in [*TIERS.items()][-1:] if tiny else TIERS.items():
            yield _case(f"{name}, {length} tokens", tiers, length, 1 if tiny else BATCH, device)
    yield _append_case(64 if tiny else 2048, 2 if tiny else 64, device)


def turns_of(tiers: tuple[tuple[int, int], ...], device: torch.device) -> Turns:
    """Transforms as calibration makes them in shape, with means, rotary embedding and digits."""
    mean = torch.randn(len(tiers), 1, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    frequencies = 5e5 ** -(torch.arange(DIM // 2, dtype=torch.float64) / (DIM // 2))
    statics = {"balance": torch.eye(DIM)[None], "frequencies": frequencies, "order": torch.arange(DIM)}
    spectrum = 2.0 ** -(torch.arange(DIM) / 8)[None]
    keys = [
        Transform.of_keys(**statics, mean=mean[head], spectrum=spectrum, bits=bits) if bits < 8 else None
        for head, (bits, _) in enumerate(tiers)
    ]
    rotation = Transform.rotation(1, DIM)
    return Turns.of(keys, [rotation if bits < 8 else None for _, bits in tiers], DIM).to(device)


def _layout(tiers: tuple[tuple[int, int], ...], capacity: int) -> CodeLayout:
    keys, values = zip(*tiers, strict=True)
    return CodeLayout(RingLayout((capacity,) * len(tiers), (SINK,) * len(tiers)), keys, values, DIM, 2)


def _case(
    name: str, tiers: tuple[tuple[int, int], ...], length: int, batch: int, device: torch.device
) -> Case:  # fmt: skip
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    layout, turns = _layout(tiers, length), turns_of(tiers, device)
    generator = torch.Generator(device).manual_seed(length)
    randn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
    query = randn(batch, GROUP * KV_HEADS, 1, DIM)
    stored = Stored(
        *(part.random_(256, generator=generator) for part in layout.empty(batch, dtype, device)[:2]),
        *(part.uniform_(0.2, 0.4, generator=generator) for part in layout.empty(batch, dtype, device)[2:4]),
        *(part.normal_(generator=generator) for part in layout.empty(batch, dtype, device)[4:]),
    )
    lens = torch.full((batch,), length, device=device)
    spans = HeadSpans(((SINK, length, 0, 0),) * KV_HEADS)
    run = partial(decode_codes, query, stored, lens, layout, turns, spans, impl="triton")
    return Case(
        kernel="coded_decode",
        name=name,
        shapes={"query": list(query.shape), "capacity": length, "tiers": tiers, "dtype": str(dtype).split(".")[1]},
        run=run,
        verify=partial(_verify, run, partial(decode_codes, query, stored, lens, layout, turns, spans, impl="torch")),
        # Times are of a step over as many tokens: the ratio is that of tokens per second.
        references={"16 bits, equal spans": partial(_plain, query, lens, layout, spans)},
        bytes=stored.nbytes,
    )


def _plain(query: torch.Tensor, lens: torch.Tensor, layout: CodeLayout, spans: HeadSpans) -> Run:
    keys, values = (torch.randn_like(query[:, :1, 0].expand(-1, layout.rings.slots, -1)) for _ in range(2))
    return partial(span_decode, query, keys, values, lens, layout.rings, spans, impl="triton")


def _verify(run: Run, reference: Run) -> None:
    """Against the torch reference, which itself is tested against float64."""
    (out, lse), (expected, expected_lse) = run(), reference()
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    assert error < 2e-2, f"relative error {error:.2e}"
    assert (lse - expected_lse).abs().max() < 5e-2, "log-sum-exp"


def _append_case(capacity: int, batch: int, device: torch.device) -> Case:
    """One new token for each of many samples."""
    tiers = TIERS["4 bits"]
    layout, turns = _layout(tiers, capacity), turns_of(tiers, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    stored = layout.empty(batch, dtype, device)
    new = [torch.randn(batch, KV_HEADS, 1, DIM, device=device).to(dtype) for _ in range(2)]
    lens = torch.arange(batch, device=device) * 17
    by_torch = partial(append_codes, *new, layout.empty(batch, dtype, device), lens, layout, turns, impl="torch")

    def verify() -> None:
        run()
        expected = layout.empty(batch, dtype, device)
        append_codes(*new, expected, lens, layout, turns, impl="torch")
        for found, wanted in zip(stored, expected, strict=True):
            # In float32, a number on the edge of two levels may get the other one.
            assert (found != wanted).float().mean() < 1e-3

    run = partial(append_codes, *new, stored, lens, layout, turns, impl="triton")
    return Case(
        kernel="coded_append",
        name=f"one token, {batch} samples, 4 bits",
        shapes={"new": list(new[0].shape), "capacity": capacity, "dtype": str(dtype).split(".")[1]},
        run=run,
        verify=verify,
        references={"torch": lambda: by_torch},
    )
