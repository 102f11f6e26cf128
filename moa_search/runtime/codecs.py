"""How precisely the heads of one layer store keys and values, and what attention sees of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from moa_kernels.codes import Codec, Transform, wants_transform

from moa_search.errors import UnsupportedInputError
from moa_search.formats.tiers import PLAIN

if TYPE_CHECKING:
    from moa_search.formats import Plan
    from moa_search.formats.tiers import Tier


@dataclass(frozen=True)
class HeadCodecs:
    """Of one KV head."""

    key: Codec
    value: Codec


@dataclass(frozen=True)
class LayerCodecs:
    """Of a layer's KV heads. Two are equal if they store every vector as the same bytes.

    Attributes:
        tiers: Bits of keys and of values, by KV head.
        transforms: Hash of the plan's transforms of keys; None where no head needs them.
        heads: The codecs, by KV head.
    """

    tiers: tuple[Tier, ...]
    transforms: str | None
    heads: tuple[HeadCodecs, ...] = field(compare=False, repr=False)

    def on(self, device: torch.device) -> LayerCodecs:
        """The same on a device."""
        if all(codec.transform is None or codec.transform.into.device == device for codec in self._each()):
            return self
        heads = tuple(HeadCodecs(_on(head.key, device), _on(head.value, device)) for head in self.heads)
        return LayerCodecs(self.tiers, self.transforms, heads)

    def seen(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor, sink: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they come back from the cache, in their own types.

        Args:
            key: ``[batch, kv_heads, tokens, head_dim]``.
            value: ``[batch, kv_heads, tokens, value_dim]``.
            positions: ``[batch or 1, tokens]``, int64.
            sink: Tokens before this position stay as they are.

        Raises:
            UnsupportedInputError: Values aren't as wide as keys.
        """
        if value.shape[-1] != key.shape[-1]:
            raise UnsupportedInputError(
                f"values of {value.shape[-1]} numbers beside keys of {key.shape[-1]} can't be stored in fewer bits"
            )
        at = positions[:, None]  # [batch or 1, kv_heads = 1, tokens]
        keys = [head.key.seen(key[:, h : h + 1], at, sink) for h, head in enumerate(self.heads)]
        values = [head.value.seen(value[:, h : h + 1], at, sink) for h, head in enumerate(self.heads)]
        return torch.cat(keys, 1), torch.cat(values, 1)

    def _each(self) -> list[Codec]:
        return [codec for head in self.heads for codec in (head.key, head.value)]


def layer_codecs(plan: Plan) -> list[LayerCodecs | None]:
    """The codecs of every layer; None where all heads of a layer store 16 bits.

    Args:
        plan: The plan, with its transforms.

    Raises:
        PlanFormatError: The plan came without its transforms.
    """
    transforms = plan.key_transforms
    found: list[LayerCodecs | None] = []
    for layer, tiers in enumerate(plan.tiers):
        if all(tier == PLAIN for tier in tiers):
            found.append(None)
            continue
        keys = None
        if transforms is not None:
            keys = Transform.of_keys(*map(torch.from_numpy, transforms.layer(layer)))
        turned = rotation(plan.model.head_dim)
        heads = tuple(
            HeadCodecs(
                Codec(key_bits, keys.of([head]) if keys is not None and wants_transform(key_bits) else None),
                Codec(value_bits, turned if wants_transform(value_bits) else None),
            )
            for head, (key_bits, value_bits) in enumerate(tiers)
        )
        found.append(LayerCodecs(tuple(tiers), plan.transforms, heads))
    return found


def rotation(width: int) -> Transform:
    """The signed Hadamard rotation of one head's vectors of ``width`` numbers."""
    return Transform.rotation(1, width)


def _on(codec: Codec, device: torch.device) -> Codec:
    return codec if codec.transform is None else Codec(codec.bits, codec.transform.to(device))
