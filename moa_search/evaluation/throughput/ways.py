"""Ways to run one model: which attention, which cache, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.cache_utils import Cache

from moa_search.evaluation.compare import under
from moa_search.formats import Plan
from moa_search.modeling import private
from moa_search.runtime import MoACache

KINDS = ("dense", "dense-static", "plan", "plan-static")
"""``dense`` is what transformers does by default (SDPA, a cache that grows), ``dense-static`` its fast path (SDPA, a
StaticCache as long as the run, decoding compiled); ``plan`` is a plan with a cache that grows, ``plan-static`` the same
with a cache of fixed size and compiled decoding."""


@dataclass(frozen=True)
class Way:
    """One way to run a model.

    Attributes:
        name: Shown in tables.
        kind: One of `KINDS`.
        plan: What the model runs under, or None.
    """

    name: str
    kind: str
    plan: Plan | None = None

    @property
    def is_compiled(self) -> bool:
        """Whether decoding is compiled, on a cache of fixed size."""
        return self.kind.endswith("-static")

    def plan_at(self, length: int) -> Plan | None:
        """The plan for prompts of ``length`` tokens."""
        return None if self.plan is None else self.plan.resolve(length)

    def on(self, model: Any, length: int) -> AbstractContextManager[Any]:
        """The model run this way, for prompts of ``length`` tokens."""
        return under(model, self.plan_at(length))

    def cache(self, model: Any, length: int, tokens: int) -> Cache | None:
        """A cache for ``tokens`` tokens after a prompt of ``length``, or None where `generate` makes a growing one."""
        if not self.is_compiled:
            return None
        plan = self.plan_at(length)
        if plan is None:
            return StaticCache(config=model.config, max_cache_len=tokens)
        return MoACache(model.config, plan, max_length=tokens)


def make_ways(kinds: Sequence[str], plans: dict[str, Plan]) -> list[Way]:
    """Dense ways first, then those of each plan."""
    ways = [Way(kind, kind) for kind in KINDS if kind in kinds and kind.startswith("dense")]
    for name, plan in plans.items():
        ways += [Way(name, kind, plan) for kind in KINDS if kind in kinds and kind.startswith("plan")]
    return ways


def cache_bytes(cache: Cache) -> int:
    """Bytes allocated for keys and values."""
    if isinstance(cache, MoACache):
        return cache.nbytes
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(states.nbytes for states in held if states is not None)


@contextmanager
def generating_on(model: Any, *, prefill_chunk: int | None) -> Iterator[None]:
    """A model whose `generate` decodes greedily, compiles on any device and never stops early."""
    compiling = CompileConfig(dynamic=False)
    private.compile_everywhere(compiling)
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, prefill_chunk_size=prefill_chunk, compile_config=compiling
    )
    try:
        yield
    finally:
        model.generation_config = before
        forget_compiled(model)


def forget_compiled(model: Any) -> None:
    """Free what `generate` has compiled for a model."""
    if private.forget_compiled(model):
        torch.compiler.reset()
