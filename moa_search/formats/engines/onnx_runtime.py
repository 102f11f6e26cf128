"""ONNX Runtime: ``local_window_size`` of the ``GroupQueryAttention`` nodes, by layer, as a JSON file of ours.

A window per layer, the query included; -1 keeps all. Models hold the number in their graph, for which ONNX Runtime has
no file: ``docs/engines.md`` puts it there.
"""

from __future__ import annotations

from typing import Any

from moa_search.formats.engines.base import Engine
from moa_search.formats.engines.windows import LayerWindows, read_spans
from moa_search.formats.signature import ModelSignature

SECTION, WINDOWS = "GroupQueryAttention", "local_window_size"


class ONNXRuntime(Engine):
    """Attributes of its operator."""

    name = "onnx"
    title = "ONNX Runtime"

    def claims(self, content: dict[Any, Any]) -> bool:  # noqa: D102
        section = content.get(SECTION)
        return isinstance(section, dict) and WINDOWS in section

    def write(self, windows: LayerWindows, model: ModelSignature) -> dict[str, Any]:  # noqa: D102
        return {SECTION: {WINDOWS: [-1 if span is None else span for span in windows.spans]}}

    def read(self, content: dict[Any, Any], model: ModelSignature, source: str) -> LayerWindows:  # noqa: D102
        spans = read_spans(content[SECTION][WINDOWS], model, f"{source}: {WINDOWS}", dense=-1)
        return LayerWindows(spans, (0,) * len(spans))
