"""Means and second moments of a layer's queries, keys and values, from which the keys' transform is solved.

Queries and keys are taken before rotary embedding (`Rotary.turn` with ``back``), where all positions are alike, and of
tokens that will be coded: callers leave out the sink's tokens, whose keys are unlike all others, and padding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moa_kernels.codes.balancing import balance

ALIKE = 1e-12
"""Variance over mean square below which keys are taken for all alike."""


@dataclass(frozen=True)
class Moments:
    """Sums over tokens, float64; sums of parts are added.

    Attributes:
        tokens: How many keys, an integer tensor.
        key: ``[kv_heads, width]``.
        key_square: ``sum k k^T``, ``[kv_heads, width, width]``.
        query_square: ``sum q q^T`` over the query heads of a KV head, ``[kv_heads, width, width]``.
        value: ``[kv_heads, value_width]``.
        value_square: ``sum v v^T``, ``[kv_heads, value_width, value_width]``.
    """

    tokens: Tensor
    key: Tensor
    key_square: Tensor
    query_square: Tensor
    value: Tensor
    value_square: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> Moments:
        """Of some tokens.

        Args:
            query: ``[heads, tokens, width]``; consecutive heads share a KV head.
            key: ``[kv_heads, tokens, width]``.
            value: ``[kv_heads, tokens, value_width]``.
        """
        q = query.double().unflatten(0, (len(key), -1)).flatten(1, 2)  # [kv_heads, group * tokens, width]
        k, v = key.double(), value.double()
        tokens = torch.tensor(key.shape[1], device=key.device)
        return cls(tokens, k.sum(1), k.mT @ k, q.mT @ q, v.sum(1), v.mT @ v)

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def key_statics(self) -> tuple[Tensor, Tensor, Tensor]:
        """Balancing matrix, mean and spectrum of keys, for `Transform.of_keys`; float32, as files keep them.

        Returns:
            ``[kv_heads, width, width]``, ``[kv_heads, width]`` and ``[kv_heads, width]``.

        Raises:
            ValueError: No token was seen, or numbers weren't finite.
        """
        if not self.tokens:
            raise ValueError("no token was seen: keys have no mean")
        mean, square = self.key / self.tokens, self.key_square / self.tokens
        spread = square - mean[:, :, None] * mean[:, None]
        # Of keys that are all alike, such as a bias, rounding alone is left, which may be negative.
        sizes, left = (part.diagonal(dim1=-2, dim2=-1).sum(-1) for part in (square, spread))
        spread = torch.where((left <= ALIKE * sizes)[:, None, None], 0, spread)
        matrix, spectrum = balance(spread, self.query_square / self.tokens)
        # Of keys too small for float32 any spectrum will do, but for zeros.
        return matrix.float(), mean.float(), spectrum.float().clamp(min=torch.finfo(torch.float32).tiny)
