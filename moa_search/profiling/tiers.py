"""What seeing keys, or values, in fewer bits adds to the influence of heads, from the same backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from moa_kernels.backends import Impl
from moa_kernels.coded_influence import CODED_STATISTICS, coded_changes
from moa_kernels.codes import Codec, Transform, wants_transform
from torch import Tensor

from moa_search.formats.tiers import SIDES, TierLength, TiersHeader, TierStatistics, tier_grid
from moa_search.formats.transforms import KeyTransforms

Arrays = dict[str, npt.NDArray[np.float32]]


def tier_statistic(side: str, bits: int, statistic: str) -> str:
    """What a sample's results call a change.

    Args:
        side: ``key`` or ``value``.
        bits: Of its codec.
        statistic: One of `CODED_STATISTICS`.
    """
    return f"{side}{bits}/{statistic}"


@dataclass(frozen=True)
class TierMeter:
    """Measures the changes of one model's layers.

    Attributes:
        bits: Below 16, decreasing.
        transforms: Of keys.
        impl: Which implementation computes them, as in `moa_kernels.backends`.
    """

    bits: tuple[int, ...]
    transforms: KeyTransforms
    impl: Impl = "auto"

    @property
    def statistics(self) -> list[str]:
        """Names of what `changes` gives."""
        return [tier_statistic(side, bits, name) for side in SIDES for bits in self.bits for name in CODED_STATISTICS]

    def changes(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        grad: Tensor,
        *,
        length: int,
        sink: int,
        **options: Any,
    ) -> dict[str, Tensor]:
        """By name each ``[kv_heads, bucket, window]``.

        Args:
            layer: Whose tensors they are.
            query: ``[heads, N, head_dim]``.
            key: ``[kv_heads, N, head_dim]``.
            value: As ``key``.
            grad: Gradient of the attention's output, ``[heads, N, head_dim]``.
            length: The sample's target length.
            sink: First tokens, kept and stored in 16 bits.
            options: Of the attention, as for `coded_changes`.
        """
        grid = tier_grid(length)
        of_keys, of_values = self._codecs(layer, value)
        found = coded_changes(
            query,
            self._seen(key, of_keys, sink),
            self._seen(value, of_values, sink),
            grad,
            windows=grid.windows,
            row_buckets=grid.row_buckets,
            bucket_rows=-(-length // grid.row_buckets),
            sink=sink,
            impl=self.impl,
            **options,
        )
        codecs = [(side, bits) for side in SIDES for bits in self.bits]
        return {
            tier_statistic(side, bits, name): change
            for name, changes in found.items()
            for (side, bits), change in zip(codecs, changes.unbind(-1), strict=True)
        }

    def _codecs(self, layer: int, value: Tensor) -> tuple[list[Codec], list[Codec]]:
        """Of a layer's keys and values, on the device of ``value``; made once, for all samples."""
        known = self.__dict__.setdefault("_by_layer", {})
        if (layer, value.device) not in known:
            statics = {name: torch.from_numpy(array) for name, array in self.transforms.layer(layer).items()}
            rotation = Transform.rotation(len(value), value.shape[-1])
            keys, values = [], []
            for bits in self.bits:
                turned = wants_transform(bits)
                keys.append(Codec(bits, Transform.of_keys(**statics, bits=bits).to(value.device) if turned else None))
                values.append(Codec(bits, rotation.to(value.device) if turned else None))
            known[layer, value.device] = keys, values
        found: tuple[list[Codec], list[Codec]] = known[layer, value.device]
        return found

    def _seen(self, x: Tensor, codecs: Sequence[Codec], sink: int) -> Tensor:
        """``x`` and what each codec gives back, ``[codec, kv_heads, N, head_dim]``."""
        positions = torch.arange(x.shape[1], device=x.device)
        return torch.stack([x, *(codec.seen(x, positions, sink) for codec in codecs)])

    def header(self, lengths: Sequence[int]) -> TiersHeader:
        """For a profile of these lengths."""
        return TiersHeader(bits=self.bits, lengths=tuple(map(tier_grid, lengths)))


class TierAccumulator:
    """Gathers the changes of samples, by length.

    Args:
        meter: What measured them.
    """

    def __init__(self, meter: TierMeter) -> None:
        self._meter = meter
        self._samples: dict[int, list[dict[str, npt.NDArray[np.floating]]]] = {}
        self._tokens: dict[int, list[int]] = {}

    def add(self, length: int, answer_tokens: int, statistics: dict[str, npt.NDArray[np.floating]]) -> None:
        """Add one sample.

        Args:
            length: Its target length in tokens.
            answer_tokens: Of the sample, those that count.
            statistics: By name each ``[layer, kv_head, bucket, window]``.
        """
        self._tokens.setdefault(length, []).append(answer_tokens)
        self._samples.setdefault(length, []).append({name: statistics[name] for name in self._meter.statistics})

    def result(self) -> TierStatistics:
        """Everything gathered so far."""
        by_length = {}
        for length, samples in sorted(self._samples.items()):
            keys, values = ({bits: _stacked(samples, side, bits) for bits in self._meter.bits} for side in SIDES)
            tokens = np.array(self._tokens[length], dtype=np.float32)
            by_length[length] = TierLength(tier_grid(length), tokens, keys, values)
        return TierStatistics(self._meter.transforms, by_length)


def _stacked(samples: list[dict[str, npt.NDArray[np.floating]]], side: str, bits: int) -> Arrays:
    """A codec's changes of all samples, ``[sample, layer, kv_head, bucket, window]`` by statistic."""
    return {
        name: np.stack([sample[tier_statistic(side, bits, name)] for sample in samples]).astype(np.float32)
        for name in CODED_STATISTICS
    }
