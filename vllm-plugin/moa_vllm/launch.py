"""Launches of the kernels over pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from moa_search.spans import SpanRule, span

STEP = 16
"""Parts that are merged at once."""


@dataclass(frozen=True)
class Settings:
    """How `attend_pages` runs.

    Attributes:
        queries: New tokens of a program.
        tile: Keys of a step.
        warps: Of a program.
        stages: Of loads in flight.
        programs: Parts that the keys of all KV heads and requests are cut into, about; 0 for one per head.
        least: Steps that are worth a part of their own.
    """

    queries: int
    tile: int
    warps: int
    stages: int = 3
    programs: int = 2048
    least: int = 4


def settings_for(head_dim: int, dtype: torch.dtype, *, decoding: bool) -> Settings:
    """What suits a step: decoding alone, or prompts among it."""
    block_d = _power_of_two(head_dim)
    # More would run out of shared memory, and four warps, with a prompt's rows, of registers.
    tile = 64 if block_d * dtype.itemsize <= (256 if decoding else 128) else 32
    warps = 8 if block_d > 128 else 4
    return Settings(1, tile, warps) if decoding else Settings(16, tile, warps, programs=0)


@dataclass(frozen=True)
class Cut:
    """The parts that a step's keys are cut into.

    Attributes:
        shares: ``[part, 3]``: its KV head, its number there, and of how many.
        parts: ``[KV head, 2]``: its first part, and how many it has.
        counts: The same numbers per KV head on the host.
    """

    shares: torch.Tensor
    parts: torch.Tensor
    counts: tuple[int, ...]


@lru_cache(maxsize=1024)
def cut(
    rules: tuple[SpanRule, ...],
    min_span: int,
    longest: int,
    requests: int,
    settings: Settings,
    device: torch.device,
) -> Cut:
    """Cut the keys of each KV head in proportion to its span, so that all parts take as long.

    Args:
        rules: Per KV head.
        min_span: Smallest span in tokens.
        longest: Longest context in tokens, about.
        requests: At once, padding included.
        settings: Of the launch.
        device: Where the tables go.
    """
    spans = [span(longest, rule, min_span) for rule in rules]
    each = settings.programs / (requests * sum(spans))
    counts = [max(1, min(round(each * some), some // (settings.least * settings.tile))) for some in spans]
    shares = [(head, part, count) for head, count in enumerate(counts) for part in range(count)]
    parts = [(sum(counts[:head]), count) for head, count in enumerate(counts)]
    on_device = partial(torch.tensor, dtype=torch.int32, device=device)
    return Cut(on_device(shares), on_device(parts), tuple(counts))


@lru_cache(maxsize=1024)
def device_table(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small table on a device: the same ones are asked for at every step, by every layer."""
    return torch.tensor(values, dtype=dtype, device=device)


def addresses(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where tensors begin, ``[tensor]``."""
    return device_table(tuple(tensor.data_ptr() for tensor in tensors), torch.int64, tensors[0].device)


def store_pages(
    keys: torch.Tensor, values: torch.Tensor, pages: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]
) -> None:
    """Write the new tokens of a layer.

    Args:
        keys: ``[token, KV head, head_dim]``.
        values: Likewise.
        pages: Per KV head, ``[block, token in block, head_dim of key and value]``.
        slots: Per KV head, ``[token]``, int64; negative ones are padding.
    """
    from moa_vllm.kernel import store_kernel

    tokens, heads, dim = keys.shape
    assert keys.stride()[1:] == values.stride()[1:] == (dim, 1)
    store_kernel[(tokens, heads)](
        keys, values, addresses(pages), addresses(slots),
        keys.stride(0), values.stride(0), pages[0].stride(0), pages[0].stride(1),
        PAGE=pages[0].shape[1], HEAD_DIM=dim, BLOCK_D=_power_of_two(dim),
    )  # fmt: skip


def attend_pages(
    output: torch.Tensor,
    query: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    pages: Sequence[torch.Tensor],
    tables: Sequence[torch.Tensor],
    rules: Sequence[SpanRule],
    *,
    sink: int,
    min_span: int,
    scale: float,
    decoding: bool,
    longest: int | None = None,
    settings: Settings | None = None,
) -> None:
    """Attend, each KV head of a layer by its own rule.

    Args:
        output: ``[token, query head, head_dim]``, filled in.
        query: Likewise.
        starts: ``[request + 1]``, int32, where each request's new tokens begin.
        lengths: ``[request]``, int32, tokens with the new ones.
        pages: Per KV head, ``[block, token in block, head_dim of key and value]``.
        tables: Per KV head, ``[request, block]``, int32.
        rules: Per KV head.
        sink: First tokens that are always attended.
        min_span: Smallest span in tokens.
        scale: Of scores.
        decoding: Whether no request has more than one new token.
        longest: Longest context in tokens, about; by default what the tables have room for.
        settings: Of the launch; by default those of `settings_for`.
    """
    from moa_vllm.kernel import attend_kernel, merge_kernel

    (tokens, query_heads, dim), heads, requests = query.shape, len(pages), len(lengths)
    group, device, page = query_heads // heads, query.device, pages[0].shape[1]
    assert query.stride()[1:] == output.stride()[1:] == (dim, 1)
    settings = settings or settings_for(dim, query.dtype, decoding=decoding)
    longest = _power_of_two(longest or tables[0].shape[1] * page)
    pieces = cut(tuple(rules), min_span, longest, requests, settings, device)
    programs, most = sum(pieces.counts), max(pieces.counts)
    shape = (tokens, group, programs) if most > 1 else (0,)
    sums, tops, totals = (
        torch.empty(*size, dtype=torch.float32, device=device) for size in ((*shape, dim), shape, shape)
    )
    strides = device_table(tuple(table.stride(0) for table in tables), torch.int64, device)
    numbers = tuple(number for rule in rules for number in (rule.alpha, rule.beta_256))
    block_d = _power_of_two(dim)
    attend_kernel[(tokens // settings.queries + requests, programs)](
        output, sums, tops, totals, query, starts, lengths,
        addresses(pages), addresses(tables), strides, device_table(numbers, torch.int32, device), pieces.shares,
        requests, sink, min_span, scale,
        query.stride(0), output.stride(0), pages[0].stride(0), pages[0].stride(1),
        GROUP=group, HEAD_DIM=dim, BLOCK_D=block_d, PAGE=page, QUERIES=settings.queries,
        ROWS=max(16, _power_of_two(settings.queries * group)), TILE=settings.tile, SPLIT=most > 1,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=settings.warps, num_stages=settings.stages,
    )  # fmt: skip
    if most > 1:
        merge_kernel[(tokens, query_heads)](
            output, sums, tops, totals, starts, pieces.parts, requests, programs, output.stride(0),
            GROUP=group, HEAD_DIM=dim, BLOCK_D=block_d, MOST=_power_of_two(most), STEP=STEP,
        )  # fmt: skip


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
