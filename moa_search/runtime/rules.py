"""A plan's rules for one decoder layer, as the attention function and the cache need them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from operator import sub
from typing import TYPE_CHECKING, Any

from moa_kernels.rings import RingLayout
from moa_kernels.spans import HeadSpans
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moa_search.errors import ConfigError, ModelMismatchError, ModelUnsupportedError
from moa_search.formats import ModelSignature, Plan
from moa_search.modeling.support import require_own_keys
from moa_search.modeling.text import text_config
from moa_search.runtime.codecs import LayerCodecs, layer_codecs
from moa_search.runtime.streaming import Stream
from moa_search.spans import BETA_ONE, SpanRule, span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moa_search.runtime.layer import MoACacheLayer


@dataclass(frozen=True)
class LayerRules:
    """Which keys the heads of one layer attend.

    Attributes:
        rules: One rule per KV head.
        sink: First tokens that are always attended; 0 in a native layer, which keeps only its own window.
        block: Tokens by which the layer's cache grows; also the smallest window.
        sliding_window: The model's own window in tokens, applied on top of the rules; None where it has none.
        codecs: How precisely the heads store keys and values; None where all store 16 bits.
        stream: What happens beyond the context; None where nothing special does. Caches don't depend on it.
    """

    rules: tuple[SpanRule, ...]
    sink: int
    block: int
    sliding_window: int | None = None
    codecs: LayerCodecs | None = None
    stream: Stream | None = field(default=None, compare=False)

    def streams(self, tokens: int, past: MoACacheLayer | None = None) -> bool:
        """Whether one of ``tokens`` new tokens after a past may be beyond the context of a stream.

        Only a stream asks for the past's length: a cache of fixed size asks the device for it, which no step may.
        """
        if self.stream is None:
            return False
        return tokens + (0 if past is None else past.longest) > self.stream.context

    @cached_property
    def heads_by_rule(self) -> dict[SpanRule, tuple[int, ...]]:
        """The distinct rules, each with the KV heads that follow it."""
        return {
            rule: tuple(head for head, other in enumerate(self.rules) if other == rule)
            for rule in dict.fromkeys(self.rules)
        }

    @cached_property
    def head_spans(self) -> HeadSpans:
        """The same rules as the integers that kernels take."""
        return self.shifted(0)

    def shifted(self, shift: int) -> HeadSpans:
        """The rules for positions less ``shift`` tokens, a multiple of 256: beta times it is an integer."""
        assert shift % BETA_ONE == 0
        rules = ((rule.alpha + rule.beta_256 * (shift // BETA_ONE), rule.beta_256) for rule in self.rules)
        return HeadSpans.of(rules, sink=self.sink, min_span=self.sink + self.block, sliding_window=self.sliding_window)

    def capacities(self, length: int, slack: int = 0) -> list[int]:
        """Slots per KV head that hold every key a query up to context ``length`` may need, plus ``slack``."""
        most = length if self.sliding_window is None else self.sink + self.sliding_window
        kept = [min(span(length, rule, self.sink + self.block), most) for rule in self.rules]
        return [min(tokens + slack, length) for tokens in kept]

    def roomy_length(self, length: int) -> int:
        """The longest context to lay out a cache for that holds ``length`` tokens, one block to spare per head at most.

        Heads that grow slowly get room for many blocks of tokens, so that the cache is seldom moved; for about twice
        its length where no head grows.
        """
        now = self.capacities(length)
        choices = range(length + 1, 2 * (length + self.block) + 1)
        excess = bisect_right(choices, self.block, key=lambda tokens: max(map(sub, self.capacities(tokens), now)))
        return choices[excess - 1]

    def layout(self, capacities: Sequence[int]) -> RingLayout:
        """Where a cache with so many slots per KV head keeps their keys."""
        return RingLayout(tuple(capacities), (self.sink,) * len(capacities))


def layer_rules(plan: Plan, config: Any, stock: Sequence[Any] | None = None) -> tuple[LayerRules, ...]:
    """The rules of every layer of a model.

    Args:
        plan: The plan.
        config: Configuration of the model.
        stock: Cache layers that transformers would use for the model; built from ``config`` by default.

    Raises:
        ConfigError: The plan's rules aren't anchored at positions.
        PlanFormatError: The plan came without its transforms of keys.
        ModelMismatchError: The plan was made for another model, or a native layer has no sliding window.
        ModelUnsupportedError: The model's attention isn't a plain causal one with its own keys in each layer.
    """
    if plan.anchor != "position":
        raise ConfigError(
            f'plan: anchor "{plan.anchor}" fixes spans at one length; apply plan.anchored_at(length) instead'
        )
    text = text_config(config)
    require_own_keys(config)
    plan.model.require(ModelSignature.of(config), "plan")
    stock = DynamicCache(config=text).layers if stock is None else stock
    if not any(isinstance(layer, DynamicLayer) for layer in stock):
        raise ModelUnsupportedError(f"{text.model_type}: none of its layers attends, so there is nothing to shorten")
    windows = [layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None for layer in stock]
    return rules_of(plan, windows)


def rules_of(plan: Plan, windows: Sequence[int | None]) -> tuple[LayerRules, ...]:
    """The rules of every layer of the plan's model.

    Args:
        plan: The plan.
        windows: The model's own sliding window of every layer, in tokens; None where it has none.

    Raises:
        PlanFormatError: The plan came without its transforms of keys.
        ModelMismatchError: A native layer has no sliding window, or another one.
    """
    native = plan.native_layers
    for layer in native:
        if windows[layer] != plan.native_window:
            raise ModelMismatchError(
                f"plan: layer {layer} is to keep the model's own window of {plan.native_window} tokens, "
                f"but it attends {windows[layer] or 'all'} tokens; profile and search again"
            )
    made = tuple(
        LayerRules(
            rules=tuple(rules),
            sink=0 if layer in native else plan.sink,
            block=plan.block,
            sliding_window=window,
            codecs=codecs,
        )
        for layer, (rules, window, codecs) in enumerate(zip(plan.rules, windows, layer_codecs(plan), strict=True))
    )
    for rules in made:
        _ = rules.head_spans  # now, since a compiler can't follow how it is made when it is asked for
    return made
