"""What keys and values go through before they are coded, and how attention undoes it without decoding them.

With M a head's matrix and m its mean, what is stored of a vector x is a code of ``y = (x - m) M``. Scores need no
inverse per key, ``q . x = (q M^-T) . y + q . m``, and outputs one per query, ``sum_j w_j x_j = (sum_j w_j y_j) M^-1 +
(sum_j w_j) m``. For values M is a signed Hadamard rotation, which spreads every outlier over all channels (QuaRot,
arXiv 2404.00456). For keys a balancing matrix (`moa_kernels.codes.balancing`) stands before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transform:
    """One layer's transform of keys, or of values; float64.

    Attributes:
        into: M, ``[kv_heads, width, width]``; vectors are rows, ``y = (x - mean) @ into``.
        back: Its inverse.
        mean: ``[kv_heads, width]``, or None where nothing is taken off.
    """

    into: Tensor
    back: Tensor
    mean: Tensor | None = None

    @classmethod
    def rotation(cls, kv_heads: int, width: int) -> Transform:
        """The signed Hadamard rotation alone, the same for every head.

        Args:
            kv_heads: Of the layer.
            width: Numbers in a vector.
        """
        matrix = hadamard(width).expand(kv_heads, -1, -1)
        return cls(matrix, matrix.mT)

    @classmethod
    def balanced(cls, balance: Tensor, mean: Tensor) -> Transform:
        """A balancing matrix, then the rotation.

        Args:
            balance: ``[kv_heads, width, width]``, invertible.
            mean: ``[kv_heads, width]``.

        Raises:
            ValueError: Shapes don't fit together, numbers aren't finite, or a matrix has no inverse.
        """
        if balance.ndim != 3 or balance.shape[1] != balance.shape[2] or mean.shape != balance.shape[:2]:
            raise ValueError(
                f"balance {tuple(balance.shape)} must be [kv_heads, width, width] and mean {tuple(mean.shape)} "
                "[kv_heads, width]"
            )
        if not (balance.isfinite().all() and mean.isfinite().all()):
            raise ValueError("balance and mean must be finite")
        rotation = hadamard(balance.shape[-1]).to(balance.device)
        inverse, failed = torch.linalg.inv_ex(balance.double())
        if failed.any() or not inverse.isfinite().all():
            raise ValueError(f"balance of KV heads {failed.nonzero()[:, 0].tolist()} has no inverse")
        return cls(balance.double() @ rotation, rotation.mT @ inverse, mean.double())

    def apply(self, x: Tensor) -> Tensor:
        """What is to be coded, float64.

        Args:
            x: ``[..., kv_heads, tokens, width]``.
        """
        x = x.double()
        if self.mean is not None:
            x = x - self.mean[:, None]
        return x @ self.into

    def invert(self, y: Tensor) -> Tensor:
        """Vectors of what was coded, float64; the inverse of `apply`.

        Args:
            y: ``[..., kv_heads, tokens, width]``.
        """
        x = y.double() @ self.back
        return x if self.mean is None else x + self.mean[:, None]

    def queries(self, query: Tensor) -> Tensor:
        """Queries that score coded keys: ``q M^-T``, in the type of ``query``.

        Args:
            query: ``[..., heads, tokens, width]``; consecutive heads share a KV head.
        """
        grouped: Tensor = query.unflatten(-3, (len(self.back), -1))  # [..., kv_heads, group, tokens, width]
        return (grouped @ self.back.mT[:, None].to(query.dtype)).flatten(-4, -3)

    def query_bias(self, query: Tensor) -> Tensor | None:
        """What every score of a coded key lacks, ``q . mean``, in the type of ``query``; None without a mean.

        It is the same for all keys of a head, yet not for nothing: keys kept in 16 bits (sinks) don't lack it, nor does
        a sink logit, and a soft cap sees it.

        Args:
            query: ``[..., heads, tokens, width]``.

        Returns:
            ``[..., heads, tokens]``.
        """
        if self.mean is None:
            return None
        grouped: Tensor = query.unflatten(-3, (len(self.mean), -1))
        return (grouped @ self.mean[:, None, :, None].to(query.dtype)).squeeze(-1).flatten(-3, -2)

    def outputs(self, weighted: Tensor, weights: Tensor | None = None) -> Tensor:
        """Attention outputs of weighted sums of coded values, in the type of ``weighted``.

        Args:
            weighted: ``sum_j w_j y_j``, ``[..., heads, tokens, width]``.
            weights: ``sum_j w_j`` over the same coded values, ``[..., heads, tokens]``; only a mean needs them.
        """
        grouped: Tensor = weighted.unflatten(-3, (len(self.back), -1))  # [..., kv_heads, group, tokens, width]
        out = grouped @ self.back[:, None].to(weighted.dtype)
        if self.mean is not None:
            assert weights is not None, "values with a mean need the sum of the weights"
            shares = weights.unflatten(-2, (len(self.mean), -1))[..., None]
            out = out + shares * self.mean[:, None, None].to(weighted.dtype)
        return out.flatten(-4, -3)

    def of(self, heads: Sequence[int]) -> Transform:
        """The transform of some of the KV heads.

        Args:
            heads: Their indices, in the order wanted.
        """
        index = torch.tensor(heads, dtype=torch.long, device=self.into.device)
        return Transform(self.into[index], self.back[index], None if self.mean is None else self.mean[index])

    def to(self, device: torch.device | str) -> Transform:
        """The same on another device."""
        mean = None if self.mean is None else self.mean.to(device)
        return Transform(self.into.to(device), self.back.to(device), mean)


def hadamard(width: int) -> Tensor:
    """Random signs, then a Hadamard matrix: orthonormal, float64 ``[width, width]``, for vectors that are rows.

    Widths that are no power of two get Hadamard blocks on the diagonal, of the largest power of two that divides them
    (as vLLM's ``int4_per_token_head``). The signs keep a constant vector from landing in one channel; they are a fixed
    function of the channel.

    Args:
        width: Numbers in a vector.
    """
    block = width & -width
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rotation: Tensor = torch.block_diag(*[matrix] * (width // block)) * block**-0.5
    # The top bit of a multiplicative hash (Knuth), so that no generator has to stay the same for ever.
    signs = 1 - 2 * ((torch.arange(1, width + 1) * 2654435761 % 2**32) >> 31)
    return signs[:, None].double() * rotation
