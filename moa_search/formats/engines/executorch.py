"""ExecuTorch: ``model.local_global_attention`` of the YAML file that ``export_llm --config`` takes.

A window per layer, the query included; 0 keeps all. Rings hold twice the window. Its attention sink is one for all
layers and excludes windows per layer.
"""

from __future__ import annotations

from typing import Any

from moa_search.formats.engines.base import Engine
from moa_search.formats.engines.windows import LayerWindows, read_spans
from moa_search.formats.signature import ModelSignature

SECTION, WINDOWS = "model", "local_global_attention"


class ExecuTorch(Engine):
    """`ModelConfig` of its `LlmConfig`."""

    name = "executorch"
    title = "ExecuTorch"

    def claims(self, content: dict[Any, Any]) -> bool:  # noqa: D102
        section = content.get(SECTION)
        return isinstance(section, dict) and WINDOWS in section

    def write(self, windows: LayerWindows, model: ModelSignature) -> dict[str, Any]:  # noqa: D102
        return {SECTION: {"use_kv_cache": True, WINDOWS: [span or 0 for span in windows.spans]}}

    def read(self, content: dict[Any, Any], model: ModelSignature, source: str) -> LayerWindows:  # noqa: D102
        spans = read_spans(content[SECTION][WINDOWS], model, f"{source}: {WINDOWS}", dense=0)
        return LayerWindows(spans, (0,) * len(spans))
