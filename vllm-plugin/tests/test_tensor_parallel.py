"""Tensor parallelism: each rank has its share of a plan's heads, and all of them the same blocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import Engine, Reference

NEW = 12


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
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, NEW, detokenize=False)
    trace = engine.drain()
    for number, prompt in enumerate(prompts):
        assert trace.answers[str(number)].tokens == reference.run(prompt, NEW), len(prompt)
    # Each rank has two of the four heads, one a group.
    assert [len(group.layer_names) for group in engine.groups] == [1, 1]
    assert engine.used_blocks == 0
    dense = len(engine.groups) * sum(-(-(len(prompt) + NEW) // 16) for prompt in prompts)
    assert 0 < trace.used_blocks < dense
