"""Prefill against float64 softmaxes under masks written out row by row."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from moa_kernels.backends import BackendUnavailableError
from moa_kernels.launch import LaunchConfig, overridden
from moa_kernels.prefill import span_prefill
from moa_kernels.prefill.work import plan_work, tiles_per_item
from moa_kernels.spans import HeadSpans

from .seeds import DEFAULT_SEEDS, seeds
from .yardstick import DEVICE, DTYPES, Batch, Masked, assert_within, randn


@dataclass
class Problem:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    spans: HeadSpans
    starts: list[int] | None
    ends: list[int] | None
    options: dict

    def solve(self, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
        starts, ends = (
            None if bound is None else torch.tensor(bound, dtype=torch.int32, device=DEVICE)
            for bound in (self.starts, self.ends)
        )
        return span_prefill(
            self.query, self.key, self.value, self.spans, starts=starts, ends=ends, impl=impl, **self.options
        )

    def masked(self) -> Masked:
        """The same by an explicit mask."""
        return Masked(self.query, self.key, self.value, visible(self).to(DEVICE), **self.options)


def visible(problem: Problem) -> torch.Tensor:
    """Boolean ``[batch, kv_heads, queries, keys]``, one row at a time."""
    batch, _, queries, _ = problem.query.shape
    keys = problem.key.shape[2]
    mask = torch.zeros(batch, len(problem.spans.heads), queries, keys, dtype=torch.bool)
    column = torch.arange(keys)
    for b in range(batch):
        start = problem.starts[b] if problem.starts else 0
        end = problem.ends[b] if problem.ends else keys
        real = (column >= start) & (column < end)
        for h, (sink, min_span, alpha, beta_256) in enumerate(problem.spans.heads):
            for t in range(queries):
                row = keys - queries + t
                if not (max(start, 0) <= row < end):
                    continue
                i = row - start
                span = min(i + 1, max(min_span, alpha + beta_256 * (i + 1) // 256))
                j = column - start
                kept = (j < sink) | (j > i - (span - sink))
                mask[b, h, t] = real & (j <= i) & kept & (j > i - problem.spans.sliding_window)
    return mask


def make(seed: int, **fixed) -> tuple[Problem, LaunchConfig]:
    """A random problem, NaN in every key that nobody may read, and random tile sizes."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    group, kv_heads = pick.choice([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (8, 1)])
    keys = fixed.get("keys") or pick.choice([1, 2, 5, 31, 32, 33, 64, 65, 97, 113, 128, 130])
    queries = fixed.get("queries") or pick.choice([keys, keys, pick.randint(1, keys), 1])
    batch = 1 if group * kv_heads > 2 else pick.choice([1, 1, 2, 3])
    dim = pick.choice([16, 16, 24, 32, 64, 80])
    dtype = fixed.get("dtype") or pick.choice(DTYPES)
    heads = []
    for _ in range(kv_heads):
        sink = pick.choice([0, 1, 4, 17, 32, 300])
        least = sink + pick.choice([1, 3, 16, 32, 33, 64, 500])
        heads.append((sink, least, *pick.choice([(0, 256), (0, 0), (-20, 200), (40, 64), (7, 128), (0, 77)])))
    sliding = pick.choice([2**30, 2**30, 2**30, 1, 10, 40, 400])
    starts = pick.choice([None, [pick.choice([0, -5, -400, pick.randint(0, keys)]) for _ in range(batch)]])
    ends = pick.choice([None, None, [pick.randint(0, keys) for _ in range(batch)]])
    query = randn(generator, batch, queries, group * kv_heads, dim, dtype=dtype, scale=2.0).transpose(1, 2)
    key, value = (randn(generator, batch, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
    options = {
        "scale": pick.choice([None, 0.3]),
        "softcap": pick.choice([None, None, 3.0]),
        "sink_logits": pick.choice([None, None, randn(generator, group * kv_heads, dtype=torch.float32)]),
    }
    problem = Problem(query, key, value, HeadSpans(tuple(heads), sliding), starts, ends, options)
    unread = ~visible(problem).any(2)[..., None].to(DEVICE)
    smallest = batch * group * kv_heads * queries // 6  # the interpreter takes milliseconds a program
    block_m = pick.choice([size for size in (16, 32, 64, 128) if size >= smallest] or [128])
    config = LaunchConfig(block_m, pick.choice([32, 64] if keys > 50 else [16, 32]), 4, 2)
    # A tile of keys is read as a whole, but for keys that are no tokens or newer than all its rows.
    real = torch.zeros(batch, 1, keys, 1, dtype=torch.bool)
    for b in range(batch):
        real[b, :, max(starts[b], 0) if starts else 0 : ends[b] if ends else keys] = True
    poisoned = unread & ~real.to(DEVICE)
    problem.key, problem.value = (x.masked_fill(poisoned, torch.nan) for x in (key, value))
    return problem, config


BATCH = Batch(lambda: (make(seed)[0].masked() for seed in range(DEFAULT_SEEDS)))


def check(problem: Problem, impl: str, note: object) -> None:
    masked = problem.masked()
    out, lse = problem.solve(impl)
    assert_within((out, lse), masked, BATCH, note)
    dead = ~masked.visible.any(-1).repeat_interleave(problem.query.shape[1] // problem.key.shape[1], 1)
    assert (out[dead] == 0).all(), note


@pytest.mark.parametrize("seed", seeds(240))
def test_triton_is_as_close_to_float64_as_plain_torch(seed):
    problem, config = make(seed)
    with overridden("prefill", config):
        check(problem, "triton", (seed, config, problem.spans, problem.starts, problem.ends, problem.options))


@pytest.mark.parametrize("seed", range(60))
def test_the_reference_is_too(seed):
    check(make(seed)[0], "torch", seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_work_shared_out_gives_the_same(seed, dtype, monkeypatch):
    """Few long rows: their keys are divided among programs, whose results are merged in a fixed order."""
    monkeypatch.setattr("moa_kernels.prefill.work.FEWEST_TILES", 1)
    monkeypatch.setattr("moa_kernels.backends.INTERPRETED_MULTIPROCESSORS", 16)
    poison_empty(monkeypatch)
    plan_work.cache_clear()
    problem, _ = make(1000 + seed, dtype=dtype, queries=1 + 4 * seed, keys=97)
    with overridden("prefill", LaunchConfig(16, 16, 4, 2)):
        check(problem, "triton", seed)
        first, second = problem.solve("triton"), problem.solve("triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plan_work.cache_clear()


def poison_empty(monkeypatch) -> None:
    """Workspaces and outputs start as NaN."""
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape: object, **options: object) -> torch.Tensor:
        made = empty(self, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.parametrize("shape", [(1, 1), (113, 203), (239, 239), (128, 256), (1, 257)])
def test_odd_shapes(shape):
    queries, keys = shape
    generator = torch.Generator().manual_seed(keys)
    query = randn(generator, 1, 4, queries, 64, dtype=torch.float16)
    key, value = (randn(generator, 1, 2, keys, 64, dtype=torch.float16) for _ in range(2))
    spans = HeadSpans.of([(0, 256), (0, 64)], sink=4, min_span=36)
    check(Problem(query, key, value, spans, None, None, {}), "triton", shape)


def test_a_chunked_prefill_equals_a_whole_one():
    """Rows don't depend on how many come with them, to the bit where tiles are the same."""
    generator = torch.Generator().manual_seed(0)
    query = randn(generator, 1, 4, 192, 32, dtype=torch.float16)
    key, value = (randn(generator, 1, 2, 192, 32, dtype=torch.float16) for _ in range(2))
    spans = HeadSpans.of([(0, 128), (10, 32)], sink=5, min_span=37)
    with overridden("prefill", LaunchConfig(32, 32, 4, 2)):
        whole, _ = span_prefill(query, key, value, spans, impl="triton")
        parts = [
            span_prefill(query[:, :, a:b], key[:, :, :b], value[:, :, :b], spans, impl="triton")[0]
            for a, b in ((0, 64), (64, 160), (160, 192))
        ]
    assert torch.equal(torch.cat(parts, 2), whole)


def test_a_chunk_by_itself_and_its_past_merge_by_their_log_sum_exps():
    """With a negative start a chunk attends itself at its true positions; sink and old keys are merged in."""
    generator = torch.Generator().manual_seed(1)
    keys, past = 160, 96
    query = randn(generator, 1, 2, keys - past, 16, dtype=torch.float32)
    key, value = (randn(generator, 1, 1, keys, 16, dtype=torch.float32) for _ in range(2))
    spans = HeadSpans.of([(0, 256)], sink=0, min_span=1)
    whole, whole_lse = span_prefill(query, key, value, spans, impl="triton")
    start = torch.tensor([-past], dtype=torch.int32, device=DEVICE)
    own, own_lse = span_prefill(query, key[:, :, past:], value[:, :, past:], spans, starts=start, impl="triton")
    scores = query @ key[:, :, :past].mT * 16**-0.5
    old, old_lse = scores.softmax(-1) @ value[:, :, :past], scores.logsumexp(-1)
    total = torch.logaddexp(own_lse, old_lse)
    merged = own * (own_lse - total).exp()[..., None] + old * (old_lse - total).exp()[..., None]
    torch.testing.assert_close(total, whole_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)


def test_every_tile_is_done_once_whatever_is_divided():
    spans = HeadSpans.of([(0, 256), (0, 32), (0, 256)], sink=16, min_span=48)
    for queries, keys, processors in ((4096, 4096, 132), (64, 8192, 132), (100, 100, 4), (1, 5000, 132)):
        work = plan_work(
            spans, batch=2, group=4, queries=queries, keys=keys, token_bytes=512, block_m=128, block_n=64,
            processors=processors, device=torch.device("cpu"),
        )  # fmt: skip
        items = work.items.long()
        tiles = -(-queries // 128)
        done = torch.zeros(2 * 12 * tiles, dtype=torch.double)
        done.index_add_(0, items[:, 0] * tiles + items[:, 1], 1 / items[:, 3].double())
        torch.testing.assert_close(done, torch.ones_like(done))
        slots = items[items[:, 4] >= 0, 4]
        assert sorted(slots.tolist()) == list(range(work.slots))
        assert work.shared[:, 3].sum() == work.slots
        assert (work.slots > 0) == (queries < 128 and keys > 1000), (queries, keys)
        cost = tiles_per_item(spans, queries, keys, 128, 64)[(items[:, 0] % 12) // 4, items[:, 1]] / items[:, 3]
        even = cost.sum() / processors
        assert cost.max() <= max(0.5 * even, 8) + 1, (queries, keys)


def test_heads_that_share_keys_are_neighbours():
    work = plan_work(
        HeadSpans.of([(0, 256), (0, 64)], sink=16, min_span=48), batch=1, group=4, queries=2048, keys=2048,
        token_bytes=512, block_m=128, block_n=64, processors=8, device=torch.device("cpu"),
    )  # fmt: skip
    fours = work.items[:, 0].view(-1, 4) // 4
    assert (fours == fours[:, :1]).all()
    assert (work.items[:, 1].view(-1, 4) == work.items[::4, 1, None]).all()


def test_compiles_whole_and_keeps_its_operator_contract():
    generator = torch.Generator().manual_seed(2)
    query = randn(generator, 2, 4, 20, 16, dtype=torch.float32)
    key, value = (randn(generator, 2, 2, 30, 16, dtype=torch.float32) for _ in range(2))
    spans = HeadSpans.of([(0, 128), (3, 0)], sink=2, min_span=6, sliding_window=25)
    starts = torch.tensor([0, 4], device=DEVICE)

    def twice(query, key, value, starts):
        out, lse = span_prefill(query, key, value, spans, starts=starts, softcap=5.0, impl="torch")
        return out * 2, lse

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")(query, key, value, starts)
    for mine, theirs in zip(compiled, twice(query, key, value, starts), strict=True):
        torch.testing.assert_close(mine, theirs)
    arguments = (query, key, value, spans.flat, spans.sliding_window, starts, None, 0.25, 5.0, None, "torch")
    torch.library.opcheck(torch.ops.moa_kernels.span_prefill.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (1, 2, 3, 16)}, "alike"),
        ({"query": (1, 4, 9, 16)}, "doesn't fit key"),
        ({"query": (1, 4, 4, 8)}, "doesn't fit key"),
        ({"query": (1, 3, 4, 16)}, "3 query heads, 2 KV heads"),
        ({"starts": torch.zeros(2, dtype=torch.int32)}, "starts must be"),
        ({"ends": torch.zeros(1)}, "ends must be"),
        ({"sink_logits": torch.zeros(2)}, "sink_logits must be"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"query": (1, 4, 4, 16), "key": (1, 2, 8, 16), "value": (1, 2, 8, 16), **change}
    arguments = {k: torch.zeros(v, device=DEVICE) if isinstance(v, tuple) else v for k, v in arguments.items()}
    query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
    with pytest.raises(ValueError, match=message):
        span_prefill(query, key, value, HeadSpans.dense(2), **arguments)


def test_triton_refuses_what_it_cannot_do():
    states = torch.zeros(1, 1, 4, 16, device=DEVICE)
    with pytest.raises(BackendUnavailableError, match="float64"):
        span_prefill(*[states.double()] * 3, HeadSpans.dense(1), impl="triton")
    with pytest.raises(BackendUnavailableError, match="no gradient"):
        span_prefill(states.requires_grad_(), states, states, HeadSpans.dense(1), impl="triton")
    wide = torch.zeros(1, 1, 4, 512, device=DEVICE)
    with pytest.raises(BackendUnavailableError, match="head_dim is 512"):
        span_prefill(*[wide] * 3, HeadSpans.dense(1), impl="triton")
