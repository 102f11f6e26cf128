"""TensorRT-LLM: ``kv_cache_config`` of the YAML file that its ``--config`` takes, with ``max_attention_window``.

A window per layer, the query included; one of at least the whole context keeps all. ``sink_token_length`` isn't
written: attention has ignored it since caches aren't cyclic any more, and it is deprecated since May 2026
(NVIDIA/TensorRT-LLM#14275).
"""

from __future__ import annotations

from typing import Any

from moa_search.formats.engines.base import Engine
from moa_search.formats.engines.windows import LayerWindows, read_spans
from moa_search.formats.signature import ModelSignature

SECTION, WINDOWS = "kv_cache_config", "max_attention_window"


class TensorRTLLM(Engine):
    """`KvCacheConfig` of its LLM API."""

    name = "tensorrt-llm"
    title = "TensorRT-LLM"

    def claims(self, content: dict[Any, Any]) -> bool:  # noqa: D102
        section = content.get(SECTION)
        return isinstance(section, dict) and WINDOWS in section

    def write(self, windows: LayerWindows, model: ModelSignature) -> dict[str, Any]:  # noqa: D102
        context = model.usual_lengths[-1]
        return {SECTION: {WINDOWS: [context if span is None else span for span in windows.spans]}}

    def read(self, content: dict[Any, Any], model: ModelSignature, source: str) -> LayerWindows:  # noqa: D102
        spans = read_spans(content[SECTION][WINDOWS], model, f"{source}: {WINDOWS}")
        context = model.usual_lengths[-1]
        return LayerWindows(tuple(span if span and span < context else None for span in spans), (0,) * len(spans))
