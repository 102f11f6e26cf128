"""vLLM's own coordinator and block pool over groups of heads, without a model."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from moa_search.spans import DENSE, SpanRule
from moa_vllm import register
from moa_vllm.cache import SpanSpec

PAGE, CHUNK, LONGEST = 16, 64, 2048
RULES = [
    (SpanRule(0, 32),),
    (SpanRule(-512, 256),),
    (SpanRule(64, 0), SpanRule(-64, 48)),
    (SpanRule(300, 0),),
    (DENSE,),
]
register()
init_none_hash(sha256)


def spec(group: int, rules: tuple[SpanRule, ...], sink: int) -> SpanSpec:
    made = SpanSpec(
        block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.float32, sliding_window=1, group=group, rules=rules,
        sink=sink, min_span=sink + 32, longest=LONGEST, in_flight=CHUNK,
    )  # fmt: skip
    return replace(made, sliding_window=made.span(LONGEST))


def manager(blocks: int, sink: int = 16) -> KVCacheManager:
    groups = [KVCacheGroupSpec([f"layers.{i}.h"], spec(i, rules, sink)) for i, rules in enumerate(RULES)]
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(config, LONGEST, PAGE, PAGE, max_in_flight_tokens=CHUNK)


def request(name: str, tokens: list[int]) -> Request:
    hasher = get_request_block_hasher(PAGE, sha256)
    return Request(name, tokens, SamplingParams(max_tokens=9), None, block_hasher=hasher)


def visible(of: SpanSpec, n: int) -> set[int]:
    """Blocks that a query with a context of n attends, its own aside; by the definition, not by the table."""
    start = n - of.span(n) + of.sink
    return {t // PAGE for t in range(n - 1) if t < of.sink or t >= start}


def advance(kv: KVCacheManager, r: Request, count: int, hit: tuple[Any, int] | None = None) -> bool:
    """Schedule tokens as the scheduler does; what a query attends is there, and little else is held."""
    blocks, cached = hit or (None, 0)
    if kv.allocate_slots(r, count, cached, blocks, full_sequence_must_fit=hit is not None) is None:
        return False
    start = r.num_computed_tokens + cached
    for m in kv.coordinator.single_type_managers:
        held = m.req_to_blocks[r.request_id]
        real = {i for i, block in enumerate(held) if not block.is_null}
        for n in {start + 1, start + count // 2 + 1, start + count}:
            assert visible(m.kv_cache_spec, n) <= real
        assert len(real) <= m.kv_cache_spec.blocks_held(start + count)
    r.num_computed_tokens = start + count
    return True


@pytest.mark.parametrize("sink", [0, 16, 40])
@pytest.mark.parametrize("seed", range(2))
def test_random_schedules(seed: int, sink: int) -> None:
    """Prompts that share beginnings, chunks, preemption: nothing that is attended is missing, nothing leaks."""
    rng = random.Random(seed)
    kv = manager(rng.choice([700, 2000]), sink)
    pool, bases = kv.block_pool, [[rng.randrange(99) for _ in range(1500)] for _ in range(3)]
    live: dict[str, Request] = {}
    hits = 0
    for step in range(150):
        if len(live) < 4 and rng.random() < 0.3:
            base, cut = rng.choice(bases), rng.randrange(20, 1500)
            r = request(f"r{step}", base[:cut] + [rng.randrange(99) for _ in range(rng.randrange(1, 200))])
            blocks, cached, *_ = kv.get_computed_blocks(r)
            for group, m in enumerate(kv.coordinator.single_type_managers):
                real = {i for i, block in enumerate(blocks.blocks[group]) if not block.is_null}
                assert visible(m.kv_cache_spec, cached + 1) <= real
            hits += cached > 0
            if advance(kv, r, min(CHUNK, r.num_tokens - cached), (blocks, cached)):
                live[r.request_id] = r
        for r in list(live.values()):
            left = r.num_tokens - r.num_computed_tokens
            if not left:
                if rng.random() < 0.1:
                    kv.free(live.pop(r.request_id))
                    continue
                r.append_output_token_ids(rng.randrange(99))
                left = 1
            if not advance(kv, r, min(CHUNK, left)):
                kv.free(live.pop(r.request_id))  # preempted
    for r in live.values():
        kv.free(r)
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert hits > 1


def prefill(kv: KVCacheManager, r: Request) -> None:
    while r.num_computed_tokens < r.num_tokens:
        assert advance(kv, r, min(CHUNK, r.num_tokens - r.num_computed_tokens))


def test_the_next_turn_hits_everything() -> None:
    kv = manager(4000)
    r = request("a", list(range(1500)))
    prefill(kv, r)
    kv.free(r)
    assert kv.get_computed_blocks(request("b", [*range(1500), 1, 2, 3]))[1] == 1500 // PAGE * PAGE


def test_a_long_request_frees_what_its_plan_drops() -> None:
    kv = manager(4000)
    r = request("a", list(range(2000)))
    prefill(kv, r)
    held = kv.block_pool.num_gpu_blocks - 1 - kv.block_pool.get_num_free_blocks()
    dense = len(RULES) * -(-2000 // PAGE)
    spans = sum(m.kv_cache_spec.span(2000) for m in kv.coordinator.single_type_managers)
    assert spans / PAGE <= held <= spans / PAGE + len(RULES) * (CHUNK // PAGE + 2)
    assert held < 0.6 * dense


def test_admission_asks_for_what_a_request_will_hold_and_counts_its_hits_once() -> None:
    kv = manager(700)
    managers = kv.coordinator.single_type_managers
    first = request("a", list(range(1500)))
    peak = sum(m.kv_cache_spec.blocks_held(1500) for m in managers)
    need = sum(m.get_num_blocks_to_allocate("a", 1500, [], 0, 0, 1500, apply_admission_cap=True) for m in managers)
    assert need == peak < len(managers) * -(-1500 // PAGE)
    prefill(kv, first)
    again = request("b", [*range(1500), 7])
    blocks, cached, *_ = kv.get_computed_blocks(again)
    need = sum(
        m.get_num_blocks_to_allocate("b", 1501, blocks.blocks[i], cached, cached, 1501, apply_admission_cap=True)
        for i, m in enumerate(managers)
    )
    shared = sum(not block.is_null for group in blocks.blocks for block in group)
    assert need == sum(m.kv_cache_spec.blocks_held(1501) for m in managers) - shared
