"""Launches of the kernels over pages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from moa_search.spans import SpanRule

QUERIES = 16
"""New tokens of a program, where a request has several."""

TILE = 32
"""Keys of a step; blocks of 16 tokens and more are read whole."""

SPLITS = (8, 32)
"""Parts that the keys of a decoding step are cut into, at least and at most."""

PROGRAMS = 512
"""Programs that fill a GPU: few requests are cut into more parts."""


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
    tile: int = TILE,
    splits: int | None = None,
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
        tile: Keys of a step.
        splits: Parts that keys are cut into while decoding, a power of two; by default as many as fill a GPU.
    """
    from moa_vllm.kernel import attend_kernel, merge_kernel

    (tokens, query_heads, dim), heads, requests = query.shape, len(pages), len(lengths)
    group, device = query_heads // heads, query.device
    queries, splits = (1, splits or parts(requests * heads)) if decoding else (QUERIES, 1)
    shape = (tokens, query_heads, splits) if decoding else (0,)
    partial, tops, totals = (
        torch.empty(*size, dtype=torch.float32, device=device) for size in ((*shape, dim), shape, shape)
    )
    strides = device_table(tuple(table.stride(0) for table in tables), torch.int64, device)
    numbers = tuple(number for rule in rules for number in (rule.alpha, rule.beta_256))
    block_d = _power_of_two(dim)
    attend_kernel[(tokens // queries + requests, heads, splits)](
        output, partial, tops, totals, query, starts, lengths,
        addresses(pages), addresses(tables), strides, device_table(numbers, torch.int32, device),
        requests, sink, min_span, scale,
        query.stride(0), output.stride(0), pages[0].stride(0), pages[0].stride(1),
        GROUP=group, HEAD_DIM=dim, BLOCK_D=block_d, PAGE=pages[0].shape[1],
        QUERIES=queries, ROWS=max(16, _power_of_two(queries * group)), TILE=tile, SPLITS=splits,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=warps(block_d),
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(tokens, query_heads)](
            output, partial, tops, totals, starts, requests, output.stride(0),
            HEAD_DIM=dim, BLOCK_D=block_d, SPLITS=splits,
        )  # fmt: skip


def parts(heads: int) -> int:
    """Parts that keys are cut into where so many KV heads of all requests decode; a power of two."""
    least, most = SPLITS
    return min(max(_power_of_two(PROGRAMS // heads + 1) // 2, least), most)


def warps(block_d: int) -> int:
    """Warps of a program of `attend_kernel`: more where four would run out of registers."""
    return 8 if block_d > 128 else 4


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
