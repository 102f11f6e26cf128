"""The vLLM plug-in's kernels over pages: decoding steps, a prompt among decoding requests, storing new tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from plans import BETAS_256, SINK
from timing import Case, Run
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moa_search.spans import SpanRule, span
from moa_vllm.attend import attend
from moa_vllm.launch import attend_pages, settings_for, store_pages

DIM, GROUP, KV_HEADS, PAGE, MIN_SPAN = 128, 4, 8, 16, SINK + 64
OTHERWISE: dict[bool, dict[str, dict[str, int]]] = {
    True: {
        "tiles of 32": {"tile": 32},
        "tiles of 128": {"tile": 128},
        "8 warps": {"warps": 8},
        "5 stages": {"stages": 5},
        "7 stages": {"stages": 7},
        "5 stages, tiles of 32": {"stages": 5, "tile": 32},
        "7 stages, tiles of 32": {"stages": 7, "tile": 32},
        "4096 programs": {"programs": 4096},
        "parts of 2 steps": {"least": 2},
        "parts of 8 steps": {"least": 8},
    },
    False: {
        "tiles of 32": {"tile": 32},
        "8 warps": {"warps": 8},
        "5 stages": {"stages": 5},
        "32 queries, 4 warps": {"queries": 32},
        "32 queries, 8 warps": {"queries": 32, "warps": 8},
        "32 queries, 8 warps, 5 stages": {"queries": 32, "warps": 8, "stages": 5},
    },
}
"""Settings to compare with those that the kernel takes by itself, while decoding and with a prompt."""


@dataclass
class Pool:
    """Pages of every KV head, in random order, as a pool that has been in use for a while hands them out.

    Attributes:
        rules: Per KV head.
        news: New tokens of each request, as many at once.
        lengths: ``[request]``, tokens with the new ones.
        starts: ``[request + 1]``, where each request's new tokens begin.
        pages: Per KV head, ``[block, token in block, head_dim of key and value]``.
        tables: Per KV head, ``[request, block]``.
        query: ``[token, query head, head_dim]``.
    """

    rules: list[SpanRule]
    news: list[int]
    lengths: Tensor
    starts: Tensor
    pages: list[Tensor]
    tables: list[Tensor]
    query: Tensor

    @classmethod
    def random(cls, plan: str, news: list[int], lengths: list[int], device: torch.device) -> Pool:
        """Random keys and values in bfloat16, float32 where the interpreter runs."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        randn = partial(torch.randn, generator=generator, device=device, dtype=dtype)
        blocks = -(-max(lengths) // PAGE)
        pages, tables = [], []
        for _ in range(KV_HEADS):
            order = torch.randperm(len(lengths) * blocks, generator=generator, device=device)
            tables.append(order.int().view(len(lengths), blocks))
            pages.append(randn(len(order), PAGE, 2 * DIM))
        return cls(
            [SpanRule(0, beta_256) for beta_256 in BETAS_256[plan]],
            news,
            torch.tensor(lengths, device=device, dtype=torch.int32),
            torch.tensor([0, *torch.tensor(news).cumsum(0)], device=device, dtype=torch.int32),
            pages,
            tables,
            randn(sum(news), GROUP * KV_HEADS, DIM),
        )

    @property
    def attended_bytes(self) -> int:
        """Of the keys and values that the newest token of each request attends."""
        lengths = self.lengths.tolist()
        keys = sum(span(length, rule, MIN_SPAN) for rule in self.rules for length in lengths)
        return keys * 2 * DIM * self.query.element_size()

    def attend(self, output: Tensor, **otherwise: int) -> None:
        """By the kernel."""
        decoding = max(self.news) == 1
        settings = replace(settings_for(DIM, output.dtype, decoding=decoding), **otherwise)
        attend_pages(
            output, self.query, self.starts, self.lengths, self.pages, self.tables, self.rules, sink=SINK,
            min_span=MIN_SPAN, scale=DIM**-0.5, decoding=decoding, settings=settings,
        )  # fmt: skip

    def verify(self) -> None:
        """The first and the last tokens of each request against float64."""
        output = torch.full_like(self.query, float("nan"))
        self.attend(output)
        assert output.isfinite().all(), "not finite"
        for row, (new, length) in enumerate(zip(self.news, self.lengths.tolist(), strict=True)):
            begin = int(self.starts[row])
            for first, some in {(0, min(new, 40)), (max(new - 40, 0), new)}:
                for head, rule in enumerate(self.rules):
                    mine = slice(begin + first, begin + some), slice(head * GROUP, (head + 1) * GROUP)
                    blocks = self.tables[head][row]
                    exact = attend(
                        self.query[mine].transpose(0, 1).double(), self.pages[head][blocks.long()].double(),
                        torch.arange(len(blocks), device=blocks.device), rule, length=length - new + some,
                        sink=SINK, min_span=MIN_SPAN, scale=DIM**-0.5,
                    ).transpose(0, 1)  # fmt: skip
                    error = float((output[mine].double() - exact).norm() / exact.norm())
                    assert error < 1e-2, f"request {row}, head {head}: relative error {error:.2e}"


def cases(lengths: list[int], device: torch.device) -> Iterator[Case]:
    """Of Llama-3-8B's layers; a pool holds as many tokens of few long requests as of many short ones."""
    tiny = device.type != "cuda"
    requests, length, prompt = (1, 50, 20) if tiny else (31, 4096, 8192)
    for plan in ("25 %",) if tiny else ("dense", "25 %"):
        yield _mixed(plan, requests, length, prompt, device)
    for requests, length in ((1, 96),) if tiny else ((32, 4096), (4, 32768), (1, 131072)):
        for plan in ("25 %",) if tiny else BETAS_256:
            yield _decoding(plan, requests, length, device)
    yield _store(20 if tiny else 8192, device)


def _decoding(plan: str, requests: int, length: int, device: torch.device) -> Case:
    pool = Pool.random(plan, [1] * requests, [length] * requests, device)
    output = torch.empty_like(pool.query)

    def dense() -> Run:
        key, value = (pool.query.new_empty(requests, KV_HEADS, length, DIM).normal_() for _ in range(2))
        return partial(scaled_dot_product_attention, pool.query[:, :, None], key, value, enable_gqa=True)

    return Case(
        kernel="pages",
        name=f"{plan}, {requests} x {length} tokens, decoding",
        shapes={"query": list(pool.query.shape), "length": length, "page": PAGE, "plan": plan},
        run=partial(pool.attend, output),
        verify=pool.verify,
        references={"SDPA dense, as many tokens": dense, **_otherwise(plan, pool, output)},
        bytes=pool.attended_bytes,
    )


def _mixed(plan: str, requests: int, length: int, prompt: int, device: torch.device) -> Case:
    """A whole prompt among requests that decode."""
    pool = Pool.random(plan, [1] * requests + [prompt], [length] * requests + [prompt], device)
    output = torch.empty_like(pool.query)

    def sdpa() -> Run:
        query = pool.query[requests:].transpose(0, 1)[None]
        key, value = (torch.randn_like(query[:, :KV_HEADS]) for _ in range(2))
        return partial(scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)

    return Case(
        kernel="pages",
        name=f"{plan}, {prompt} tokens at once among {requests} x {length} decoding",
        shapes={"query": list(pool.query.shape), "page": PAGE, "plan": plan},
        run=partial(pool.attend, output),
        verify=pool.verify,
        references={
            "SDPA dense, the prompt alone": sdpa,
            **_otherwise(plan, pool, output),
        },
    )


def _otherwise(plan: str, pool: Pool, output: Tensor) -> dict[str, Callable[[], Run]]:
    """Other settings, for one plan: compiling them takes its time."""
    others = OTHERWISE[max(pool.news) == 1] if plan == "25 %" else {}
    if output.device.type != "cuda":
        others = dict([*others.items()][:1])
    return {name: partial(partial, pool.attend, output, **settings) for name, settings in others.items()}


def _store(tokens: int, device: torch.device) -> Case:
    pool = Pool.random("dense", [1], [tokens], device)
    keys, values = (torch.randn_like(pool.query[:1, :KV_HEADS].expand(tokens, -1, -1)) for _ in range(2))
    slots = [
        (table[0, :, None].long() * PAGE + torch.arange(PAGE, device=device)).flatten()[:tokens]
        for table in pool.tables
    ]

    def scatter() -> None:
        for head, (pages, places) in enumerate(zip(pool.pages, slots, strict=True)):
            pages.view(-1, 2 * DIM)[places] = torch.cat((keys[:, head], values[:, head]), -1)

    def verify() -> None:
        run()
        for head, (pages, places) in enumerate(zip(pool.pages, slots, strict=True)):
            assert torch.equal(pages.view(-1, 2 * DIM)[places], torch.cat((keys[:, head], values[:, head]), -1))

    run = partial(store_pages, keys, values, pool.pages, slots)
    return Case(
        kernel="pages_store",
        name=f"{tokens} tokens",
        shapes={"keys": list(keys.shape), "page": PAGE},
        run=run,
        verify=verify,
        references={"index_put": lambda: scatter},
        bytes=2 * (keys.nbytes + values.nbytes),
    )
