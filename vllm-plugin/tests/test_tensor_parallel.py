"""Tensor parallelism: each rank has its share of a plan's heads, and all of them the same blocks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

from engines import Engine, Reference
from moa_search import SpanRule
from moa_search.head_groups import HeadGroups, group_heads
from moa_vllm import register
from moa_vllm.cache import SpanSpec

NEW, LONGEST = 12, 1024
register()


@pytest.fixture
def engine(small: tuple[str, Path]) -> Engine:
    """Two ranks, which are processes of their own, so that their pools can't be poisoned from here."""
    return Engine(
        *small,
        poisoned=False,
        tensor_parallel_size=2,
        max_model_len=512,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=2**24,
        skip_tokenizer_init=True,
    )


def test_two_ranks_give_the_tokens_of_transformers(engine: Engine, small: tuple[str, Path]) -> None:
    reference = Reference(*small)
    prompts = [[7 * i % 509 for i in range(start, start + length)] for start, length in ((0, 9), (50, 400), (300, 97))]
    trace = engine.run(prompts, NEW, detokenize=False)
    assert trace.tokens == reference.run_each(prompts, NEW)
    # Each rank has two of the four heads, one a group.
    assert [len(group.layer_names) for group in engine.groups] == [1, 1]
    assert engine.used_blocks == 0
    dense = len(engine.groups) * sum(-(-(len(prompt) + NEW) // 16) for prompt in prompts)
    assert 0 < trace.used_blocks < dense


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_is_given_the_same_blocks(ranks: int, small: tuple[str, Path]) -> None:
    """By vLLM's own grouping and allocation, with the heads of a larger model."""
    rng = random.Random(ranks)
    layers, heads = range(6), range(8)
    rules = [[SpanRule(rng.choice([-512, 0, 64, 600]), rng.choice([0, 16, 64, 256])) for _ in heads] for _ in layers]
    groups = group_heads(rules, min_span=48, longest=LONGEST, groups=3, ranks=ranks)
    config = EngineArgs(model=small[0], dtype="float32", max_model_len=LONGEST).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"  # which the engine settles on
    share = len(heads) // ranks
    workers = [
        {
            f"layers.{layer}.attn.kv_head_{head}": span_spec(groups, groups.group_of[layer][head])
            for layer in layers
            for head in heads[rank * share : (rank + 1) * share]
        }
        for rank in range(ranks)
    ]
    found = get_kv_cache_configs(config, workers, [2**26] * ranks)
    assert len({each.num_blocks for each in found}) == 1
    for rank, each in enumerate(found):
        names = [name for group in each.kv_cache_groups for name in group.layer_names]
        assert sorted(names) == sorted(workers[rank])
        order = [group.kv_cache_spec.group for group in each.kv_cache_groups]
        assert order == [group.kv_cache_spec.group for group in found[0].kv_cache_groups]
        assert sorted(order) == list(range(len(groups.envelopes)))
        assert len({len(group.layer_names) for group in each.kv_cache_groups}) == 1


def span_spec(groups: HeadGroups, group: int) -> SpanSpec:
    rules = groups.envelopes[group]
    return SpanSpec(
        block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32, group=group, rules=rules, sink=16,
        min_span=48, sliding_window=groups.span(group, LONGEST), longest=LONGEST, in_flight=64,
    )  # fmt: skip
