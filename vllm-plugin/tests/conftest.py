"""vLLM's engine in the test's own process, one per module, on the demo model."""

from __future__ import annotations

import os

# Before anything imports vllm or triton.
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TRITON_INTERPRET="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # vLLM would bind every process to the same core
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # to look at the pool
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

from pathlib import Path
from typing import Any

import pytest

from engines import Engine

PLANS = Path(__file__).parents[2] / "profiles" / "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def demo_folder() -> str:
    """The demo model as a folder that vLLM reads."""
    from moa_search.modeling.source import find_source

    return find_source("demo").name


@pytest.fixture(scope="session")
def plans() -> Path:
    """Folder of the demo model's plans."""
    return PLANS


@pytest.fixture(scope="module")
def engine(demo_folder: str, request: pytest.FixtureRequest) -> Any:
    """The demo model under the plan of a quarter, in a small pool whose freed blocks are full of NaN."""
    options = getattr(request.module, "ENGINE", {})
    return Engine(demo_folder, PLANS / "quarter.json", **options)


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, Path]:
    """A small model of random weights, and a plan for it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moa_search import ModelSignature, Plan, SpanRule
    from moa_search.spans import DENSE

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
