"""The Triton kernels within vLLM's engine, in the interpreter on a CPU: its pages, block tables and ragged steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines import Engine, Reference
from moa_search import ModelSignature, Plan, SpanRule
from moa_search.spans import DENSE
from moa_vllm import backend, launch

NEW = 4


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch was of a decoding step."""
    found: list[bool] = []
    attend_pages = launch.attend_pages

    def counted(*arguments: object, decoding: bool, **options: object) -> None:
        found.append(decoding)
        attend_pages(*arguments, decoding=decoding, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(launch, "attend_pages", counted)
    monkeypatch.setattr(backend, "takes_kernel", lambda query: True)
    return found


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, Path]:
    """A small model of random weights, since the interpreter is slow, and a plan for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=512, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    rules = [[DENSE, SpanRule(48, 0)], [SpanRule(0, 64), SpanRule(-64, 128)]]
    plan = Plan.from_rules(rules, ModelSignature.of(config), sink=16, block=32)
    plan.save(tmp_path / "plan.json")
    return str(tmp_path / "model"), tmp_path / "plan.json"


def test_prompts_in_chunks_and_decoding(small: tuple[str, Path], launches: list[bool]) -> None:
    """Freed blocks are full of NaN; in the middle of the longer prompts, blocks are freed."""
    engine = Engine(
        *small, max_model_len=512, max_num_batched_tokens=64, kv_cache_memory_bytes=2**24, skip_tokenizer_init=True
    )
    reference = Reference(*small)
    prompts = [[7 * i % 509 for i in range(start, start + length)] for start, length in ((0, 9), (50, 150), (300, 97))]
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, NEW, detokenize=False)
    trace = engine.drain()
    for number, prompt in enumerate(prompts):
        assert trace.answers[str(number)].tokens == reference.run(prompt, NEW), len(prompt)
    assert {True, False} <= set(launches)
    assert engine.used_blocks == 0
