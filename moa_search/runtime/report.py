"""What a cache takes, for reading."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True)
class LayerReport:
    """One layer of a cache.

    Attributes:
        layer: Its index.
        batch: Samples.
        length: Tokens per sample, padding included, or what a cache of fixed size was made for.
        capacities: Tokens that each KV head has room for.
        token_bytes: Bytes of one token's key and value in one KV head, in 16 bits.
        nbytes: Bytes of keys and values.
        device: Where they are.
    """

    layer: int
    batch: int
    length: int
    capacities: tuple[int, ...]
    token_bytes: int
    nbytes: int
    device: str

    @property
    def dense_nbytes(self) -> int:
        """Bytes of a dense cache of as many tokens."""
        return self.batch * self.length * len(self.capacities) * self.token_bytes

    @property
    def share(self) -> float:
        """Bytes as a share of the dense cache's; may pass 1 by what heads have to spare."""
        return self.nbytes / self.dense_nbytes


@dataclass(frozen=True)
class CacheReport:
    """All layers that follow the plan and hold something.

    Attributes:
        layers: In the model's order.
    """

    layers: tuple[LayerReport, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of a dense cache of as many tokens."""
        return sum(layer.dense_nbytes for layer in self.layers)

    @property
    def share(self) -> float:
        """Bytes as a share of the dense cache's; 0 for a cache that holds nothing."""
        return self.nbytes / self.dense_nbytes if self.layers else 0.0

    def __str__(self) -> str:
        if not self.layers:
            return "an empty cache"
        first = self.layers[0]
        lines = [
            f"{first.batch} x {first.length} tokens, {_mebibytes(self.nbytes)}: {self.share:.1%} of a dense cache's "
            f"{_mebibytes(self.dense_nbytes)}",
            f"{'layer':>5}  {'bytes':>10}  {'share':>6}  device  tokens per KV head",
        ]
        lines += [
            f"{layer.layer:>5}  {_mebibytes(layer.nbytes):>10}  {layer.share:>6.1%}  {layer.device:<6}  "
            + " ".join(map(str, layer.capacities))
            for layer in self.layers
        ]
        return "\n".join(lines)


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / MEBIBYTE:.2f} MiB"
