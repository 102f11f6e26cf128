"""KV heads as cache layers of their own: their spec, and the manager that frees what no later query attends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from moa_search.spans import SpanRule, span

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock


@dataclass(frozen=True, kw_only=True)
class SpanSpec(SlidingWindowSpec):
    """Pages of one KV head: sink tokens, and a window that grows with the context.

    To vLLM it is a sliding window, as long as the longest span, for which it reserves what a request can hold at once.

    Attributes:
        group: Heads of one number share a block table; vLLM puts layers of equal specs together.
        rules: Of the group's heads; the longest span counts.
        sink: First tokens, never freed.
        min_span: Smallest span in tokens.
        longest: Tokens of a request at most.
        in_flight: Tokens that may be scheduled before any of them is settled.
    """

    group: int
    rules: tuple[SpanRule, ...]
    sink: int
    min_span: int
    longest: int
    in_flight: int

    def span(self, n: int) -> int:
        """Keys that a query with a context of ``n`` tokens, itself included, attends at most."""
        return max(span(n, rule, self.min_span) for rule in self.rules)

    def first_kept(self) -> list[int]:
        """By context length in tokens, the first token behind the sinks that a query attends; never falls."""
        return _first_kept(self.rules, self.sink, self.min_span, self.longest)

    @property
    def sink_blocks(self) -> int:
        """Blocks with a sink token."""
        return -(-self.sink // int(self.block_size))

    def blocks_held(self, n: int) -> int:
        """Blocks that a request holds at most at any time on its way to ``n`` tokens."""
        size, window = int(self.block_size), self.span(n) - self.sink - 1 + self.in_flight
        return min(-(-n // size), self.sink_blocks + -(-window // size) + 1)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """As `blocks_held`, at the longest context."""
        return self.blocks_held(max_model_len)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Other rules need other slots."""
        return all(spec == self for spec in kv_cache_specs.values())


@lru_cache(maxsize=64)
def _first_kept(rules: tuple[SpanRule, ...], sink: int, min_span: int, longest: int) -> list[int]:
    # A table, since the scheduler asks at every step of every request.
    n = np.arange(longest + 2, dtype=np.int64)
    spans = np.max([span(n, rule, min_span) for rule in rules], axis=0)
    kept: list[int] = np.maximum(sink, n - spans + sink).tolist()
    return kept


class SpanManager(SingleTypeKVCacheManager):
    """Frees the gap between sinks and window, and finds prefixes of which both are still there."""

    kv_cache_spec: SpanSpec

    def __init__(self, kv_cache_spec: SpanSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_blocks = kv_cache_spec.sink_blocks
        self.first_kept = kv_cache_spec.first_kept()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Blocks that a request needs; for admission, what it will hold at its own length."""
        if not apply_admission_cap or request_id in self.num_cached_block:
            blocks = super().get_num_blocks_to_allocate(request_id, num_tokens, new_computed_blocks, *args, **kwargs)
            return int(blocks)
        hits = [block for block in new_computed_blocks if not block.is_null]
        missing = max(self.kv_cache_spec.blocks_held(num_tokens) - len(hits), 0)
        return missing + int(self._get_num_evictable_blocks(hits))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take the blocks of a prefix hit; the gap in them is null and mustn't be counted as used."""
        blocks = self.req_to_blocks[request_id]
        assert not blocks
        assert not num_external_computed_tokens
        assert num_local_computed_tokens == len(new_computed_blocks) * self.block_size
        self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(blocks)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks between the sinks and the window of the next query."""
        del num_prompt_tokens
        first = self.first_kept[processed_computed_tokens + 1]
        self._remove_blocks_in_range(request_id, self.sink_blocks, first // self.block_size)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix whose sinks and window are cached in every one of the groups."""
        spec = kv_cache_spec
        assert isinstance(spec, SpanSpec)
        assert (drop_eagle_block, dcp_world_size, pcp_world_size) == (False, 1, 1)
        assert alignment_tokens == spec.block_size
        size, sinks, first_kept = spec.block_size, spec.sink_blocks, spec.first_kept()
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )
        found: dict[int, list[KVCacheBlock]] = {}

        def cached(at: int) -> bool:
            blocks = block_pool.get_cached_block(hashes[at], kv_cache_group_ids)
            if blocks:
                found[at] = blocks
            return bool(blocks)

        end = min(max_length // size, len(hashes))
        missing = (at for at in range(min(sinks, end)) if not cached(at))
        end = next(missing, end)
        # Blocks `start` to `end` are cached. Without one, no prefix beyond it can be taken.
        start = end
        while start > sinks and start > first_kept[end * size + 1] // size:
            start -= 1
            if not cached(start):
                end = start
        hit = tuple(
            [found[at][group] if at < sinks or at >= start else block_pool.null_block for at in range(end)]
            for group in range(len(kv_cache_group_ids))
        )
        return hit, end * size
