"""Prefill beside torch's fused attention and compiled flex_attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from moa_kernels.prefill import span_prefill
from moa_kernels.spans import HeadSpans
from plans import attention_density, block_lists, spans_of
from timing import Case, Run, Skipped
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DIM, GROUP, KV_HEADS = 128, 4, 8
CHECKED_ROWS = 64
BLOCK = 128
"""Of flex_attention's masks."""


def cases(lengths: list[int], device: torch.device) -> Iterator[Case]:
    """A whole prompt under each plan at each length, then its last 512 tokens as a chunk."""
    for length in lengths:
        query, key, value = _inputs(length, device)
        for plan in ("dense", "25 %", "12.5 %"):
            yield _case(plan, length, query, key, value)
        chunk = query[:, :, -min(512, length // 2) :]
        yield _case("25 %", length, chunk, key, value, chunk=True)


def _inputs(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(length)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group = GROUP if device.type == "cuda" else 1
    shapes = [(1, heads, length, DIM) for heads in (group * KV_HEADS, KV_HEADS, KV_HEADS)]
    query, key, value = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    return query, key, value


def _case(plan: str, length: int, query: Tensor, key: Tensor, value: Tensor, *, chunk: bool = False) -> Case:
    spans, rows = spans_of(plan), query.shape[2]
    run = partial(span_prefill, query, key, value, spans, impl="triton")
    references: dict[str, partial[Run]]
    if query.device.type != "cuda":
        references = {"SDPA, math": partial(_fused, SDPBackend.MATH, query, key, value)}
    elif chunk:
        references = {"SDPA dense, lower right": partial(_lower_right, query, key, value)}
    else:
        references = {
            "cuDNN dense": partial(_fused, SDPBackend.CUDNN_ATTENTION, query, key, value),
            "flash dense": partial(_fused, SDPBackend.FLASH_ATTENTION, query, key, value),
            f"flex_attention {plan}": partial(_flex, spans, query, key, value),
        }
    return Case(
        kernel="prefill",
        name=f"{plan}, {length} tokens" + (f", last {rows}" if chunk else ""),
        shapes={"query": list(query.shape), "key": list(key.shape), "dtype": str(query.dtype).split(".")[1]},
        run=run,
        verify=partial(_verify, spans, query, key, value, run),
        references=references,
        facts={"attention_density": round(attention_density(spans, length), 4)},
    )


def _verify(spans: HeadSpans, query: Tensor, key: Tensor, value: Tensor, run: Run) -> None:
    """Random rows of every head against float64."""
    out, lse = run()
    queries, keys = query.shape[2], key.shape[2]
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(queries, (min(CHECKED_ROWS, queries),), generator=generator).to(query.device)
    at = keys - queries + rows
    column = torch.arange(keys, device=query.device)
    group = query.shape[1] // key.shape[1]
    for head in range(key.shape[1]):
        alone = HeadSpans((spans.heads[head],))
        mask = alone.visible(at[None], column[None])[0, 0]
        grouped = query[0, head * group : (head + 1) * group, rows].double()
        scores = (grouped @ key[0, head].double().T * DIM**-0.5).masked_fill(~mask, -torch.inf)
        exact = scores.softmax(-1) @ value[0, head].double()
        found = out[0, head * group : (head + 1) * group, rows].double()
        error = float((found - exact).norm() / exact.norm())
        assert error < 1e-2, f"head {head}: relative error {error:.2e}"
        exact_lse = scores.logsumexp(-1)
        assert (lse[0, head * group : (head + 1) * group, rows] - exact_lse).abs().max() < 1e-3


def _fused(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Run:
    """Fused attention pinned to one backend; on expanded keys where that backend wants them."""

    def attend(*states: Tensor, **options: bool) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*states, is_causal=True, **options)

    try:
        attend(query, key, value, enable_gqa=True)
    except RuntimeError:
        group = query.shape[1] // key.shape[1]
        expanded = [x.repeat_interleave(group, 1) for x in (key, value)]
        try:
            attend(query, *expanded)
        except RuntimeError as error:
            raise Skipped(str(error).splitlines()[0]) from error
        return partial(attend, query, *expanded)
    return partial(attend, query, key, value, enable_gqa=True)


def _lower_right(query: Tensor, key: Tensor, value: Tensor) -> Run:
    """Whatever torch picks for the newest rows of a causal mask."""
    from torch.nn.attention.bias import causal_lower_right

    group = query.shape[1] // key.shape[1]
    expanded = [x.repeat_interleave(group, 1) for x in (key, value)]
    mask = causal_lower_right(query.shape[2], key.shape[2])
    return partial(scaled_dot_product_attention, query, *expanded, attn_mask=mask)


def _flex(spans: HeadSpans, query: Tensor, key: Tensor, value: Tensor) -> Run:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    length, group = query.shape[2], query.shape[1] // key.shape[1]
    some, whole = (x.repeat_interleave(group, 0)[None] for x in block_lists(spans, length, BLOCK, query.device))
    fields = torch.tensor(spans.heads, device=query.device)

    def attended(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        sink, min_span, alpha, beta_256 = (fields[h // group, column] for column in range(4))
        span = torch.maximum(min_span, alpha + ((beta_256 * (i + 1)) >> 8))
        return (j <= i) & ((j < sink) | (j > i - (span - sink)))

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        return blocks.sum(-1).int(), blocks.byte().argsort(dim=-1, descending=True, stable=True).int()

    mask = BlockMask.from_kv_blocks(
        *listed(some), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=attended, seq_lengths=(length, length)
    )
    compiled = torch.compile(flex_attention)
    return partial(compiled, query, key, value, block_mask=mask, enable_gqa=True)
