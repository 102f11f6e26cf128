"""How precisely the heads of one layer store keys and values, and what attention sees of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from moa_kernels.coded import see_tokens
from moa_kernels.codes import Transform, wants_transform
from moa_kernels.codes.storage import CodeLayout
from moa_kernels.codes.turns import Turns
from moa_kernels.rings import RingLayout

from moa_search.formats.tiers import PLAIN

if TYPE_CHECKING:
    from moa_search.formats import Plan
    from moa_search.formats.tiers import Tier


@dataclass(frozen=True)
class LayerCodecs:
    """Of a layer's KV heads. Two are equal if they store every vector as the same bytes.

    Attributes:
        tiers: Bits of keys and of values, by KV head.
        transforms: Hash of the plan's transforms of keys; None where no head needs them.
        turns: The heads' transforms.
    """

    tiers: tuple[Tier, ...]
    transforms: str | None
    turns: Turns = field(compare=False, repr=False)

    def on(self, device: torch.device) -> LayerCodecs:
        """The same on a device, made once: all caches of a model share it, and what kernels make of it."""
        turns, known = self.turns, self.__dict__.setdefault("_by_device", {})
        if device == turns.key_back.device:
            return self
        if device not in known:
            known[device] = LayerCodecs(self.tiers, self.transforms, turns.to(device))
        found: LayerCodecs = known[device]
        return found

    def __deepcopy__(self, memo: object) -> LayerCodecs:
        """Itself: nothing of it changes."""
        return self

    def __getstate__(self) -> dict[str, object]:
        """Without what was made for devices."""
        return {name: value for name, value in self.__dict__.items() if name != "_by_device"}

    def layout(self, rings: RingLayout, plain_bytes: int) -> CodeLayout:
        """Where a layer with these rings keeps its codes.

        Args:
            rings: Slots of every KV head.
            plain_bytes: Of a number of the model's type.
        """
        return _layout(rings, self.tiers, self.turns.key_back.shape[-1], plain_bytes)

    def seen(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, sink: int, impl: str = "torch"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they come back from the cache, in their own types.

        Args:
            key: ``[batch, kv_heads, tokens, head_dim]``.
            value: ``[batch, kv_heads, tokens, head_dim]``.
            positions: ``[batch or 1, tokens]``, int64.
            sink: Tokens before this position stay as they are.
            impl: What runs `see_tokens`.
        """
        rings = RingLayout((sink,) * len(self.tiers), (sink,) * len(self.tiers))
        return see_tokens(key, value, positions, self.layout(rings, key.itemsize), self.turns, impl=impl)


@functools.lru_cache(maxsize=4096)
def _layout(rings: RingLayout, tiers: tuple[Tier, ...], width: int, plain_bytes: int) -> CodeLayout:
    keys, values = zip(*tiers, strict=True)
    return CodeLayout(rings, keys, values, width, plain_bytes)


def layer_codecs(plan: Plan) -> list[LayerCodecs | None]:
    """The codecs of every layer; None where all heads of a layer store 16 bits.

    Args:
        plan: The plan, with its transforms.

    Raises:
        PlanFormatError: The plan came without its transforms.
    """
    transforms, width = plan.key_transforms, plan.model.head_dim
    turned = rotation(width)
    found: list[LayerCodecs | None] = []
    for layer, tiers in enumerate(plan.tiers):
        if all(tier == PLAIN for tier in tiers):
            found.append(None)
            continue
        keys = {}
        if transforms is not None:
            statics = {name: torch.from_numpy(array) for name, array in transforms.layer(layer).items()}
            keys = {bits: Transform.of_keys(**statics, bits=bits) for bits, _ in tiers if wants_transform(bits)}
        turns = Turns.of(
            [keys[bits].of([head]) if bits in keys else None for head, (bits, _) in enumerate(tiers)],
            [turned if wants_transform(bits) else None for _, bits in tiers],
            width,
        )
        found.append(LayerCodecs(tuple(tiers), plan.transforms, turns))
    return found


def rotation(width: int) -> Transform:
    """The signed Hadamard rotation of one head's vectors of ``width`` numbers."""
    return Transform.rotation(1, width)
