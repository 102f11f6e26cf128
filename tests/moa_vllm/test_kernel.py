"""The Triton kernels over pages against float64; what is freed is full of NaN, so that reading it shows."""

import importlib.util
from itertools import product

import pytest
import torch

from moa_search.spans import DENSE, SpanRule, span
from moa_vllm.attend import attend, store
from moa_vllm.launch import Settings, attend_pages, store_pages
from tests.interpreter import patched_once
from tests.moa_kernels.yardstick import DTYPES, Batch, Masked, assert_within, units_off

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
RULES = [SpanRule(0, 32), DENSE, SpanRule(-64, 128), SpanRule(70, 0)]
LENGTHS = (90, 333, 17)
NEWS = [(1, 1, 1), (37, 1, 5)]
SHAPES = [(16, 16, 32, 16, 3), (32, 0, 16, 24, 1)]
"""Tokens per page, sink tokens, smallest window, head_dim, query heads per KV head."""

NAN = float("nan")
KINDS = DTYPES if torch.cuda.is_available() else (torch.float16, torch.float32)
"""The interpreter multiplies bfloat16 wrongly."""


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

    def problems(self, query):
        """Attention of one request and head by its definition, and which rows and heads of the output that is."""
        group = query.shape[1] // len(RULES)
        for (head, rule), (row, length) in product(enumerate(RULES), enumerate(LENGTHS)):
            some = slice(int(self.starts[row]), int(self.starts[row + 1])), slice(head * group, (head + 1) * group)
            page = self.pages[head].shape[1]
            blocks = self.tables[head][row, : -(-length // page)].long()
            key, value = self.pages[head][blocks].flatten(0, 1)[None, None, :length].split(self.dim, -1)
            position = torch.arange(length, device=device())
            context = position[length - self.news[row] :, None] + 1
            oldest = context - span(context, rule, self.min_span) + self.sink
            visible = (position < context) & ((position < self.sink) | (position >= oldest))
            yield some, Masked(query[some].transpose(0, 1)[None], key, value, visible[None, None])

    def attended(self, query, settings=None):
        output = torch.full_like(query, NAN)
        with patched_once():
            attend_pages(
                output, query, self.starts, self.lengths, self.pages, self.tables, RULES, sink=self.sink,
                min_span=self.min_span, scale=self.scale, decoding=max(self.news) == 1, settings=settings,
            )  # fmt: skip
        return output


def drawn(seed, news, shape, dtype):
    page, sink, block, dim, group = shape
    pool = Pool(news, page=page, sink=sink, block=block, dim=dim, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return pool, torch.randn(sum(news), len(RULES) * group, dim, generator=generator).to(device(), dtype)


def problems_of_the_batch():
    for seed, (news, shape, dtype) in enumerate(product(NEWS, SHAPES, KINDS)):
        pool, query = drawn(seed, news, shape, dtype)
        yield from (problem for _, problem in pool.problems(query))


BATCH = Batch(problems_of_the_batch)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(
    ("news", "settings"),
    [
        (NEWS[0], None),
        (NEWS[0], Settings(queries=1, tile=16, warps=4, programs=60, least=1)),
        (NEWS[1], None),
    ],
    ids=["decoding", "decoding in many parts", "mixed"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_batches(shape, news, settings, dtype):
    pool, query = drawn(0, news, shape, dtype)
    found = pool.attended(query, settings)
    assert found.isfinite().all()
    for some, problem in pool.problems(query):
        output = found[some].transpose(0, 1)[None]
        assert_within((output, problem.exactly().lse.float()), problem, BATCH)


@pytest.mark.parametrize("news", NEWS, ids=["decoding", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_reference_is_the_definition(shape, news):
    """And reads nothing that is freed."""
    pool, query = drawn(0, news, shape, torch.float32)
    for (rows, heads), problem in pool.problems(query):
        (head, row) = heads.start // shape[-1], pool.starts.tolist().index(rows.start)
        found = attend(
            query[rows, heads].transpose(0, 1), pool.pages[head], pool.tables[head][row], RULES[head],
            length=LENGTHS[row], sink=pool.sink, min_span=pool.min_span, scale=pool.scale,
        )  # fmt: skip
        exact = problem.exactly()
        assert units_off(found[None], exact.output, exact.output_unit) <= 2 * BATCH.worst(torch.float32)[0]


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
