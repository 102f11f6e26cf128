"""The Triton kernels over pages against float64; what is freed is full of NaN, so that reading it shows."""

import importlib.util

import pytest
import torch

from moa_search.spans import DENSE, SpanRule, span
from moa_vllm.attend import attend, store
from moa_vllm.launch import attend_pages, store_pages
from tests.interpreter import patched_once

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
RULES = [SpanRule(0, 32), DENSE, SpanRule(-64, 128), SpanRule(70, 0)]
LENGTHS = (90, 333, 17)
NAN = float("nan")


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


class Pool:
    """Pages and block tables of each rule's head, as vLLM leaves them after freeing; the gap's entries are stale."""

    def __init__(self, news, *, page, sink, block, dim, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.sink, self.min_span, self.scale, self.dim = sink, sink + block, dim**-0.5, dim
        self.news = news
        self.starts = torch.tensor([0, *torch.tensor(news).cumsum(0)], dtype=torch.int32, device=device())
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device())
        self.pages, self.tables = [], []
        for rule in RULES:
            blocks = [-(-length // page) for length in LENGTHS]
            order = (torch.randperm(sum(blocks), generator=generator) + 3).int()
            pages = torch.full((sum(blocks) + 5, page, 2 * dim), NAN, dtype=dtype)
            table = torch.full((len(LENGTHS), 64), 2, dtype=torch.int32)
            for row, (mine, length, new) in enumerate(zip(order.split(blocks), LENGTHS, news, strict=True)):
                table[row, : len(mine)] = mine
                content = torch.randn(len(mine) * page, 2 * dim, generator=generator).to(dtype)
                content[length:] = NAN
                pages[mine.long()] = content.view(len(mine), page, 2 * dim)
                context = length - new + 1
                first = max(sink, context - span(context, rule, self.min_span) + sink)
                pages[mine[-(-sink // page) : first // page].long()] = NAN
            self.pages.append(pages.to(device()))
            self.tables.append(table.to(device()))

    def expected(self, query, dtype):
        """By the plain reference, in another type."""
        output = torch.empty_like(query, dtype=dtype)
        group = query.shape[1] // len(RULES)
        for head, rule in enumerate(RULES):
            for row, length in enumerate(LENGTHS):
                some = slice(int(self.starts[row]), int(self.starts[row + 1]))
                mine = slice(head * group, (head + 1) * group)
                output[some, mine] = attend(
                    query[some, mine].transpose(0, 1).to(dtype), self.pages[head].to(dtype), self.tables[head][row],
                    rule, length=length, sink=self.sink, min_span=self.min_span, scale=self.scale,
                ).transpose(0, 1)  # fmt: skip
        return output

    def attended(self, query):
        output = torch.full_like(query, NAN)
        with patched_once():
            attend_pages(
                output, query, self.starts, self.lengths, self.pages, self.tables, RULES,
                sink=self.sink, min_span=self.min_span, scale=self.scale, decoding=max(self.news) == 1,
            )  # fmt: skip
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("news", [(1, 1, 1), (37, 1, 5)], ids=["decoding", "mixed"])
@pytest.mark.parametrize(("page", "sink", "block", "dim", "group"), [(16, 16, 32, 16, 3), (32, 0, 16, 24, 1)])
def test_ragged_batches(news, page, sink, block, dim, group, dtype):
    """At most twice as far off as plain torch in the same type."""
    pool = Pool(news, page=page, sink=sink, block=block, dim=dim, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(sum(news), len(RULES) * group, dim, generator=generator).to(device(), dtype)
    exact = pool.expected(query, torch.float64)
    assert exact.isfinite().all(), "the reference reads nothing that is freed"
    plain = (pool.expected(query, dtype) - exact).abs().max()
    found = pool.attended(query)
    assert found.isfinite().all()
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * torch.maximum(plain, ulp)


def test_padding_of_tokens_and_requests_is_let_be():
    """A CUDA graph runs at fixed sizes: more rows of queries, and requests without new tokens."""
    pool = Pool((1, 1, 1), page=16, sink=16, block=32, dim=16, dtype=torch.float32)
    query = torch.randn(3, len(RULES) * 2, 16, generator=torch.Generator().manual_seed(1)).to(device())
    expected = pool.attended(query)
    pool.starts = torch.cat((pool.starts, pool.starts[-1:], pool.starts[-1:]))
    pool.lengths = torch.cat((pool.lengths, pool.lengths.new_zeros(2)))
    pool.tables = [torch.cat((table, table.new_full((2, 64), 2))) for table in pool.tables]
    padded = torch.cat((query, query.new_full((2, *query.shape[1:]), NAN)))
    assert torch.equal(pool.attended(padded)[:3], expected)


def test_new_tokens_go_where_the_reference_puts_them():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(7, 4, 24, generator=generator).to(device()) for _ in range(2))
    slots = [torch.randperm(96, generator=generator)[:7].to(device()) for _ in RULES]
    expected = [torch.full((6, 16, 48), NAN, device=device()) for _ in RULES]
    found = [pages.clone() for pages in expected]
    slots = [torch.where(torch.arange(7, device=device()) == 3, -1, some) for some in slots]
    for head, pages in enumerate(expected):
        there = slots[head] >= 0
        store(keys[there, head], values[there, head], pages, slots[head][there])
    with patched_once():
        store_pages(keys, values, found, slots)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(7e9), other.nan_to_num(7e9))
