"""MLX-LM: arguments of every layer's ``RotatingKVCache``, as a JSON file of ours.

``max_size`` keys, of which the first ``keep`` of the sequence and the newest, the query included; null is a
``KVCache``, which keeps all. MLX-LM takes a list of caches as ``prompt_cache`` and has no file for it:
``docs/engines.md`` makes the caches.
"""

from __future__ import annotations

from typing import Any

from moa_search.errors import ModelMismatchError, PlanFormatError
from moa_search.formats.engines.base import Engine
from moa_search.formats.engines.windows import LayerWindows
from moa_search.formats.files import one_line
from moa_search.formats.signature import ModelSignature
from moa_search.spans import MAX_LENGTH

CACHES, FIELDS = "RotatingKVCache", ("max_size", "keep")


class MLX(Engine):
    """Caches of `mlx_lm.models.cache`."""

    name = "mlx"
    title = "MLX-LM"
    keeps_sink = True

    def claims(self, content: dict[Any, Any]) -> bool:  # noqa: D102
        return CACHES in content

    def write(self, windows: LayerWindows, model: ModelSignature) -> dict[str, Any]:  # noqa: D102
        layers = zip(windows.spans, windows.sinks, strict=True)
        return {
            CACHES: [None if span is None else dict(zip(FIELDS, (span, sink), strict=True)) for span, sink in layers]
        }

    def read(self, content: dict[Any, Any], model: ModelSignature, source: str) -> LayerWindows:  # noqa: D102
        caches = content[CACHES]
        if not isinstance(caches, list):
            raise PlanFormatError(f"{source}: {CACHES} is no list of caches by layer")
        if len(caches) != model.num_hidden_layers:
            raise ModelMismatchError(f"{source}: it has {len(caches)} layers, the model {model.num_hidden_layers}")
        spans: list[int | None] = []
        sinks = []
        for layer, cache in enumerate(caches):
            size, keep = (None, 0) if cache is None else _numbers(cache, f"{source}: {CACHES}[{layer}]")
            spans.append(size)
            sinks.append(keep)
        return LayerWindows(tuple(spans), tuple(sinks))


def _numbers(cache: object, what: str) -> tuple[int, int]:
    size = cache.get("max_size") if isinstance(cache, dict) else None
    keep = cache.get("keep", 0) if isinstance(cache, dict) else None
    if type(size) is not int or type(keep) is not int or not 0 <= keep < size <= MAX_LENGTH:
        raise PlanFormatError(f"{what} is {one_line(cache)}, not null nor a max_size over a keep in tokens")
    return size, keep
