"""A plan cut down to what engines hold: one constant window per layer, for some with a sink."""

from __future__ import annotations

from dataclasses import dataclass

from moa_search.errors import ModelMismatchError, PlanFormatError
from moa_search.formats.files import one_line
from moa_search.formats.plan import Plan
from moa_search.formats.signature import ModelSignature, own_window
from moa_search.spans import BLOCK_TOKENS, DENSE, MAX_LENGTH, SpanRule


@dataclass(frozen=True)
class LayerWindows:
    """What an engine attends.

    Attributes:
        spans: By layer, the keys in tokens that a query attends, itself included; None where it attends all.
        sinks: By layer, how many of these are the first ones of the sequence.
    """

    spans: tuple[int | None, ...]
    sinks: tuple[int, ...]

    @classmethod
    def of(cls, plan: Plan, length: int, *, sinks: bool) -> LayerWindows:
        """The plan's longest span of every layer at ``length`` tokens; a native layer's own window.

        Args:
            plan: The plan.
            length: Context in tokens. A layer that attends all of it is dense.
            sinks: Whether the engine keeps the sink; without one a window is as much longer.
        """
        spans: list[int | None] = []
        for layer, heads in enumerate(plan.spans(length)):
            longest = plan.native_window if layer in plan.native_layers else max(heads)
            spans.append(None if longest is None or longest >= length else longest)
        kept = [plan.sink if sinks and layer not in plan.native_layers else 0 for layer in range(len(spans))]
        return cls(tuple(spans), tuple(kept))

    def plan(self, model: ModelSignature, source: str) -> Plan:
        """The plan that does the same in this runtime.

        Raises:
            PlanFormatError: Layers have different sinks, or a window is shorter than its sink.
        """
        native = [layer for layer, span in enumerate(self.spans) if span is not None and self._is_native(layer, model)]
        if len(native) == len(self.spans):
            native = []  # a plan keeps a choice
        sinks = {sink for layer, sink in enumerate(self.sinks) if self.spans[layer] and layer not in native}
        if len(sinks) > 1:
            raise PlanFormatError(
                f"{source}: layers keep different sinks ({', '.join(map(str, sorted(sinks)))} tokens)"
            )
        sink = sinks.pop() if sinks else 0
        shortest = min(
            (span for layer, span in enumerate(self.spans) if span and layer not in native), default=sink + 1
        )
        if shortest <= sink:
            raise PlanFormatError(f"{source}: a window of {shortest} tokens holds no more than its sink of {sink}")
        return Plan.from_rules(
            [[DENSE if span is None else SpanRule(span, 0)] * model.num_key_value_heads for span in self.spans],
            model,
            native_layers=native,
            sink=sink,
            block=min(BLOCK_TOKENS, shortest - sink),
        )

    def _is_native(self, layer: int, model: ModelSignature) -> bool:
        kinds = model.config.get("layer_types")
        slides = isinstance(kinds, list) and "sliding" in str(kinds[layer])
        return slides and not self.sinks[layer] and self.spans[layer] == own_window(model)


def read_spans(value: object, model: ModelSignature, what: str, *, dense: int | None = None) -> tuple[int | None, ...]:
    """Windows by layer from a list that may be shorter than there are layers, and is then repeated.

    Args:
        value: The list.
        model: Its model.
        what: Names the list in errors.
        dense: The number that stands for all keys.

    Raises:
        PlanFormatError: It is no list of whole numbers in range.
        ModelMismatchError: The model has no multiple of as many layers.
    """
    layers = model.num_hidden_layers
    if not isinstance(value, list) or not value:
        raise PlanFormatError(f"{what} is no list of windows by layer")
    for layer, window in enumerate(value):
        if type(window) is not int or (window != dense and not 1 <= window <= MAX_LENGTH):
            raise PlanFormatError(f"{what}[{layer}] is {one_line(window)}, no number of tokens")
    if layers % len(value):
        raise ModelMismatchError(f"{what} has {len(value)} windows, the model {layers} layers")
    return tuple(None if window == dense else window for window in value * (layers // len(value)))
