"""The Triton kernels within vLLM's engine, in the interpreter on a CPU: its pages, block tables and ragged steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import Engine, Reference
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


def test_prompts_in_chunks_and_decoding(small: tuple[str, Path], launches: list[bool]) -> None:
    """Freed blocks are full of NaN; in the middle of the longer prompts, blocks are freed."""
    engine = Engine(
        *small, max_model_len=512, max_num_batched_tokens=64, kv_cache_memory_bytes=2**24, skip_tokenizer_init=True
    )
    reference = Reference(*small)
    prompts = [[7 * i % 509 for i in range(start, start + length)] for start, length in ((0, 9), (50, 150), (300, 97))]
    trace = engine.run(prompts, NEW, detokenize=False)
    assert trace.tokens == reference.run_each(prompts, NEW)
    assert {True, False} <= set(launches)
    assert engine.used_blocks == 0
