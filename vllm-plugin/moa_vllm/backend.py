"""vLLM's attention backend for plans: every KV head attends by its own rule, over pages of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)

from moa_search.errors import ModelUnsupportedError
from moa_search.spans import span
from moa_vllm.attend import attend, store
from moa_vllm.cache import SpanSpec
from moa_vllm.served import Served, served_plan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec

    from moa_search.spans import SpanRule


class SpanBackend(AttentionBackend):
    """Chosen by name; what a plan says is in `SpanImpl`."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """A member of vLLM's enumeration."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Any multiple of 16, without splitting."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[SpanImpl]:
        """What attends."""
        return SpanImpl

    @staticmethod
    def get_builder_cls() -> type[SpanMetadataBuilder]:
        """What hands block tables over."""
        return SpanMetadataBuilder

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """What a connector loads hasn't the gaps that plans make."""
        return False


@dataclass
class SpanMetadata(AttentionMetadata):
    """Of one group of heads and one step.

    Attributes:
        tokens: New tokens of all requests.
        query_starts: ``[request + 1]``, where each request's new tokens begin.
        lengths: ``[request]``, tokens with the new ones.
        block_table: ``[request, block]``.
        slots: ``[token]``, where the new tokens are stored.
        most_new: Most new tokens of a request.
        longest: Longest request in tokens, or more.
    """

    tokens: int
    query_starts: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    most_new: int
    longest: int

    @cached_property
    def requests(self) -> list[tuple[int, int, int, int]]:
        """Number, first and last new token, and length of each request with new tokens."""
        starts, lengths = self.query_starts.tolist(), self.lengths.tolist()
        rows = enumerate(zip(starts, starts[1:], lengths, strict=False))
        return [(row, begin, end, length) for row, (begin, end, length) in rows if end > begin]


class SpanMetadataBuilder(AttentionMetadataBuilder[SpanMetadata]):
    """Passes on what the runner knows."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SpanMetadata:
        """Of one step."""
        common = common_attn_metadata
        return SpanMetadata(
            tokens=common.num_actual_tokens,
            query_starts=common.query_start_loc,
            lengths=common.seq_lens,
            block_table=common.block_table_tensor,
            slots=common.slot_mapping,
            most_new=common.max_query_len,
            longest=common.max_seq_len,
        )


class HeadCache(AttentionLayerBase):
    """One KV head's cache, a layer to vLLM's cache manager and to nobody else."""

    def __init__(self, layer: Any, served: Served, group: int) -> None:
        self.impl, self.num_heads, self.attn_backend = layer.impl, layer.num_heads, layer.attn_backend
        self.head_size, self.dtype = layer.head_size, layer.kv_cache_torch_dtype
        self.plan, self.group, self.rules = served.plan, group, served.groups.envelopes[group]
        self.kv_cache = torch.tensor([])  # vLLM puts the pages here

    def get_attn_backend(self) -> type[AttentionBackend]:
        """That of the layer."""
        backend: type[AttentionBackend] = self.attn_backend
        return backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> AttentionSpec:
        """Pages of one head."""
        longest = vllm_config.model_config.max_model_len
        return SpanSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.head_size,
            dtype=self.dtype,
            sliding_window=max(span(longest, rule, self.plan.min_span) for rule in self.rules),
            group=self.group,
            rules=self.rules,
            sink=self.plan.sink,
            min_span=self.plan.min_span,
            longest=longest,
            in_flight=vllm_config.max_in_flight_tokens,
        )


class SpanImpl(AttentionImpl[SpanMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **more: Any,
    ) -> None:
        found = {
            "ALiBi": alibi_slopes,
            "a sliding window of its own": sliding_window,
            "a soft cap": logits_soft_cap,
            "KV shared between layers": kv_sharing_target_layer_name,
            "attention other than a decoder's": attn_type != AttentionType.DECODER,
            **more,
        }
        kinds = [kind for kind, value in found.items() if value is not None and value is not False]
        if kinds:
            raise ModelUnsupportedError(f"plan: vLLM can't serve models with {', '.join(kinds)} under a plan")
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = num_heads, head_size, scale, num_kv_heads
        self.query_group = num_heads // num_kv_heads
        self.config = get_current_vllm_config()
        self.served = served_plan(self.config)
        self.rules: list[SpanRule] = []
        self.heads: list[str] = []

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Once the model is there: find this layer's rules, and give each KV head a cache of its own."""
        if self.heads:
            return
        layers = self.config.compilation_config.static_forward_context
        name, layer = next((name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        index = extract_layer_index(name)
        # Under tensor parallelism, a rank has its share of the heads; their numbers are those of the whole model.
        first = get_tensor_model_parallel_rank() * self.num_kv_heads
        mine = slice(first, first + self.num_kv_heads)
        self.rules = self.served.plan.rules[index][mine]
        for head, group in enumerate(self.served.groups.group_of[index][mine], start=first):
            # One number in the name: vLLM reads the layer's from it.
            self.heads.append(f"{name}.kv_head_{head}")
            layers[self.heads[-1]] = HeadCache(layer, self.served, group)
        layer.kv_sharing_target_layer_name = self.heads[0]  # so that vLLM gives the layer itself no cache

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SpanMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new tokens, then attend.

        Args:
            layer: The layer.
            query: ``[token, query head, head_dim]``, padded to whatever the runner likes.
            key: ``[token, KV head, head_dim]``.
            value: Likewise.
            kv_cache: Unused: each head has pages of its own.
            attn_metadata: Of the first head's group; None while vLLM measures memory.
            output: ``[token, query head, head_dim]``, filled in.
            output_scale: Unused.
            output_block_scale: Unused.

        Returns:
            ``output``.
        """
        if attn_metadata is None:
            return output.zero_()
        context = get_forward_context()
        assert isinstance(context.attn_metadata, dict)
        steps = [context.attn_metadata[name] for name in self.heads]
        pages = [context.no_compile_layers[name].kv_cache[:, 0] for name in self.heads]
        tokens = steps[0].tokens
        run = self._by_kernel if takes_kernel(query) else self._in_torch
        run(output[:tokens], query[:tokens], key[:tokens], value[:tokens], pages, steps)
        return output

    def _in_torch(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: list[torch.Tensor],
        steps: list[SpanMetadata],
    ) -> None:
        plan = self.served.plan
        for head, (mine, metadata, rule) in enumerate(zip(pages, steps, self.rules, strict=True)):
            store(key[:, head], value[:, head], mine, metadata.slots[: len(key)])
            heads = slice(head * self.query_group, (head + 1) * self.query_group)
            for row, begin, end, length in metadata.requests:
                output[begin:end, heads] = attend(
                    query[begin:end, heads].transpose(0, 1),
                    mine,
                    metadata.block_table[row],
                    rule,
                    length=length,
                    sink=plan.sink,
                    min_span=plan.min_span,
                    scale=self.scale,
                ).transpose(0, 1)

    def _by_kernel(
        self,
        output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: list[torch.Tensor],
        steps: list[SpanMetadata],
    ) -> None:
        from moa_vllm.launch import attend_pages, store_pages

        plan, step = self.served.plan, steps[0]
        store_pages(key, value, pages, [metadata.slots for metadata in steps])
        attend_pages(
            output,
            query,
            step.query_starts,
            step.lengths,
            pages,
            [metadata.block_table for metadata in steps],
            self.rules,
            sink=plan.sink,
            min_span=plan.min_span,
            scale=self.scale,
            decoding=step.most_new == 1,
            longest=step.longest,
        )


def takes_kernel(query: torch.Tensor) -> bool:
    """Whether the Triton kernels run: on GPUs, where plain torch would launch one per request and head."""
    return query.is_cuda
