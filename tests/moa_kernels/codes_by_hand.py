"""Rings of codes written token by token, and whole histories as codes give them back: what kernels are held against."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from moa_kernels.codes import BITS, Digits, Rotary, Transform, hadamard, pack, quantise
from moa_kernels.codes.storage import CodeLayout, Stored
from moa_kernels.codes.turns import Turns
from moa_kernels.rings import RingLayout
from moa_kernels.spans import FOREVER, HeadSpans
from torch import Tensor

from .rings_by_hand import visible_to, window_of
from .yardstick import DEVICE, Exact, Masked, randn


def random_turns(generator: torch.Generator, key_bits: list[int], value_bits: list[int], width: int) -> Turns:
    """Transforms that differ in every head, with means and, mostly, rotary embedding."""
    rotation = hadamard(width)
    frequencies = torch.rand(width // 2, generator=generator, dtype=torch.float64)
    if torch.rand((), generator=generator) < 0.2:
        frequencies = torch.zeros_like(frequencies)
    order = torch.randperm(width, generator=generator)

    def of_keys(bits: int) -> Transform | None:
        sizes = (0.3 * torch.randn(width, generator=generator, dtype=torch.float64)).exp()
        mean = torch.randn(1, width, generator=generator, dtype=torch.float64)
        # From channels that are all alike, none of which has two digits, to steep ones.
        spectrum = torch.exp(-6 * torch.rand((), generator=generator) * torch.arange(width) / width)[None]
        balance = ((rotation.mT * sizes) @ rotation)[None]
        return Transform.of_keys(balance, frequencies, mean, order, spectrum, bits=bits) if bits < 8 else None

    turned = Transform.rotation(1, width)
    keys, values = map(of_keys, key_bits), (turned if bits < 8 else None for bits in value_bits)
    return Turns.of([*keys], [*values], width).to(DEVICE)


@dataclass
class Vectors:
    """Keys or values of a whole history: what is stored of them, and what comes back.

    Attributes:
        plain: ``[batch, kv_heads, tokens, width]``, as they came.
        rows: uint8 ``[batch, kv_heads][tokens, bytes]``.
        scales: float16 ``[batch, kv_heads, tokens]``.
        levels: float64 ``[batch, kv_heads, tokens, width]``, under the transform.
        back: float64, likewise, with the transform undone; the sink as it came.
        coded: Boolean ``[kv_heads, tokens]``: under a transform.
    """

    plain: Tensor
    bits: list[int]
    turns: Turns
    sink: int
    keys: bool
    rows: list[list[Tensor]] = field(init=False)
    scales: Tensor = field(init=False)
    levels: Tensor = field(init=False)
    back: Tensor = field(init=False)
    coded: Tensor = field(init=False)

    def __post_init__(self) -> None:
        batch, kv_heads, tokens, _ = self.plain.shape
        self.positions = torch.arange(tokens, device=DEVICE)
        self.levels, self.back = self.plain.double().clone(), self.plain.double().clone()
        self.scales = torch.zeros(batch, kv_heads, tokens, dtype=torch.float16, device=DEVICE)
        self.rows = [[None] * kv_heads for _ in range(batch)]
        self.coded = torch.zeros(kv_heads, tokens, dtype=torch.bool, device=DEVICE)
        for head, bits in enumerate(self.bits):
            for sample in range(batch):
                self._code(sample, head, bits)
            self.coded[head, self.sink :] = bits < 8

    def _code(self, sample: int, head: int, bits: int) -> None:
        x = self.plain[sample, head]
        if bits == 16:
            self.rows[sample][head] = x.contiguous().view(torch.uint8)
            return
        turns, transform = self.turns, None
        if bits < 8 and self.keys:
            rotary = Rotary(turns.frequencies, turns.order)
            digits = Digits(turns.digits[[head]], *turns.digit_sizes[[head]].unbind(-1))
            parts = (part[[head]] for part in (turns.key_into, turns.key_back, turns.key_mean))
            transform = Transform(*parts, rotary, digits)
        elif bits < 8:
            transform = Transform(turns.value_into[[head]], turns.value_back[[head]])
        y = x.double() if transform is None else transform.apply(x[None], self.positions)[0]
        codes, scales = quantise(y[None], bits, None if transform is None else transform.digits)
        codes, scales = codes[0], scales[0]
        self.rows[sample][head], self.scales[sample, head] = pack(codes, bits), scales
        y = scales.double()[:, None] * (codes.double() - (2**bits - 1) / 2)
        self.levels[sample, head, self.sink :] = y[self.sink :]
        back = y if transform is None else transform.invert(y[None], self.positions)[0]
        self.back[sample, head, self.sink :] = back[self.sink :]


class CodedMasked(Masked):
    """Attention under an explicit mask over what codes give back.

    Units count, beside those of plain attention, what a transform's undoing rounds: errors in proportion to whole
    vectors and not to each of their numbers.
    """

    def __init__(self, keys: Vectors, values: Vectors, query: Tensor, visible: Tensor, **options: object) -> None:
        super().__init__(query, keys.back, values.back, visible, **options)  # type: ignore[arg-type]
        self.keys, self.values = keys, values

    def _softmax(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        unread = ~self.visible.any(2)[..., None]
        wide = torch.promote_types(dtype, torch.float32)
        key = self.key if dtype == torch.float64 else self._decoded(unread, wide)
        plain = Masked(self.query, key, self.value, self.visible, self.scale, self.softcap, self.sink_logits)
        scores, weights, value, lse, sizes = plain._softmax(dtype)
        if dtype == torch.float64:
            # A key is (y @ back + mean) R. What is rounded are the products of y and back, and the mean.
            turns, group = self.keys.turns, self.query.shape[1] // self.key.shape[1]
            y = self.keys.levels.masked_fill(unread, 0)
            apart = ((y**2 @ turns.key_back**2).sum(-1) + (turns.key_mean**2).sum(-1)[:, None]).sqrt()
            grown = 1 + apart / self.key.masked_fill(unread, 0).norm(dim=-1).clamp(min=1e-30)
            sizes = sizes * torch.where(self.keys.coded, grown, 1).repeat_interleave(group, 1)[:, :, None]
        return scores, weights, value, lse, sizes

    def _decoded(self, unread: Tensor, wide: torch.dtype) -> Tensor:
        """Keys as codes give them back, computed in a type."""
        turns = self.keys.turns
        y = self.keys.levels.masked_fill(unread, 0).to(wide)
        x = y @ turns.key_back.to(wide) + turns.key_mean[:, None].to(wide)
        cos, sin = (part.to(wide) for part in Rotary(turns.frequencies, turns.order).angles(self.keys.positions))
        first, second = x[..., turns.order].chunk(2, -1)
        x = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)[..., turns.order.argsort()]
        return torch.where(self.keys.coded[..., None], x, y)

    def plainly(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp with products in ``dtype``."""
        _, weights, _, lse, _ = self._softmax(dtype)
        plain, coded = self._sums(weights.to(dtype), dtype)
        return plain + coded @ self._back(dtype), lse

    def exactly(self) -> Exact:
        """In float64 over decoded values, with units."""
        exact = super().exactly()
        weights = self._softmax(torch.float64)[1]
        _, coded = self._sums(weights, torch.float64, of_sizes=True)
        turned_back = coded.norm(dim=-1, keepdim=True)  # a rotation spreads an error over all channels
        return exact._replace(output_unit=exact.output_unit + 2 * turned_back)

    def _sums(self, weights: Tensor, dtype: torch.dtype, of_sizes: bool = False) -> tuple[Tensor, Tensor]:
        group = self.query.shape[1] // self.key.shape[1]
        unread = ~self.visible.any(2)[..., None]
        y = self.values.levels.masked_fill(unread, 0).to(dtype).repeat_interleave(group, 1)
        y = y.abs() if of_sizes else y
        coded = self.values.coded.repeat_interleave(group, 0)[:, :, None]
        return weights @ y.masked_fill(coded, 0), weights @ y.masked_fill(~coded, 0)

    def _back(self, dtype: torch.dtype) -> Tensor:
        group = self.query.shape[1] // self.key.shape[1]
        return self.keys.turns.value_back.to(dtype).repeat_interleave(group, 0)


@dataclass
class CodedCase:
    """A random layer of codes in the middle of decoding."""

    query: Tensor
    keys: Vectors
    values: Vectors
    stored: Stored
    lens: list[int]
    layout: CodeLayout
    turns: Turns
    spans: HeadSpans
    softcap: float | None
    sink_logits: Tensor | None
    scale: float | None

    @classmethod
    def drawn(
        cls,
        seed: int,
        dtype: torch.dtype,
        longest: int = 90,
        widths: tuple[int, ...] = (8, 16, 24, 32, 40, 64),
        tiers: tuple[tuple[int, int], ...] | None = None,
    ) -> CodedCase:
        """Odd shapes, bits and spans of every kind, samples of very different lengths, a poisoned cache."""
        draw = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        batch, kv_heads, group = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([1, 1, 3, 8])
        new, width = draw.choice([1, 1, 1, 2, 3, 5, 8]), draw.choice(widths)
        lens = [draw.choice([0, 1, new, draw.randint(0, longest), longest]) for _ in range(batch)]
        most = max(*lens, 1)
        sliding_window = draw.choice([FOREVER, FOREVER, FOREVER, 1, 13, 40])
        sink = draw.choice([0, 1, 4, 17, 2 * longest])
        heads = []
        for _ in range(kv_heads):
            window = draw.choice([1, 1, 7, 16, 33, 2 * longest])
            alpha, beta_256 = draw.choice([(0, 0), (sink + 5, 0), (3, 64), (sink, 128), (-20, 200), (0, 256)])
            heads.append((sink, sink + window, alpha, beta_256))
        spans = HeadSpans(tuple(heads), sliding_window)
        spare = [draw.choice([0, 0, 1, 9]) for _ in heads]
        capacities = [
            min(sink + max(window_of(head, most), 1) + new - 1 + extra, most + extra)
            for head, extra in zip(heads, spare, strict=True)
        ]
        bits = [b for b in BITS if b > 4 or width % (8 if b == 3 else 4) == 0]
        drawn = [(draw.choice(bits), draw.choice(bits)) for _ in heads]
        key_bits, value_bits = zip(*(tiers or drawn)[:kv_heads] if tiers else drawn, strict=True)
        rings = RingLayout(tuple(capacities), (sink,) * kv_heads)
        layout = CodeLayout(rings, key_bits, value_bits, width, dtype.itemsize)
        turns = random_turns(generator, key_bits, value_bits, width)
        keys, values = (
            Vectors(randn(generator, batch, kv_heads, most, width, dtype=dtype), list(b), turns, sink, keys)
            for b, keys in ((key_bits, True), (value_bits, False))
        )
        return cls(
            query=randn(generator, batch, new, kv_heads * group, width, dtype=dtype).transpose(1, 2),
            keys=keys,
            values=values,
            stored=written(keys, values, lens, layout),
            lens=lens,
            layout=layout,
            turns=turns,
            spans=spans,
            softcap=draw.choice([None, None, 2.5, 30.0]),
            sink_logits=randn(generator, kv_heads * group, dtype=dtype) if draw.random() < 0.3 else None,
            scale=draw.choice([None, None, 0.3]),
        )

    @property
    def arguments(self) -> tuple[object, ...]:
        """What `decode_codes` takes by position."""
        lens = torch.tensor(self.lens, device=DEVICE)
        return self.query, self.stored, lens, self.layout, self.turns, self.spans

    @property
    def options(self) -> dict[str, object]:
        """What it takes by name."""
        return {"softcap": self.softcap, "sink_logits": self.sink_logits, "scale": self.scale}

    def masked(self) -> CodedMasked:
        """Attention of the newest tokens over the whole history, by a mask written out entry by entry."""
        visible = visible_to(self.query.shape[2], self.lens, self.spans, self.keys.plain.shape[2])
        return CodedMasked(self.keys, self.values, self.query, visible, **self.options)


def poisoned(layout: CodeLayout, batch: int, dtype: torch.dtype) -> Stored:
    """Tensors in which nothing is stored: NaN, and bytes of ones."""
    return layout.empty(batch, dtype, DEVICE).change(
        lambda part: part.fill_(255 if part.dtype == torch.uint8 else torch.nan)
    )


def written(keys: Vectors, values: Vectors, lens: list[int], layout: CodeLayout, onto: Stored | None = None) -> Stored:
    """A cache, poisoned if not given, into which the histories were stored one token after the other."""
    stored = poisoned(layout, len(lens), keys.plain.dtype) if onto is None else onto
    for vectors, (side, codes, scales, sinks) in zip((keys, values), layout.sides(stored), strict=True):
        for sample, length in enumerate(lens):
            for head, capacity in enumerate(layout.rings.capacities):
                ring = max(capacity - layout.sink, 0)
                for position in range(length):
                    if position < layout.sink:
                        sinks[sample, head * layout.sink + position] = vectors.plain[sample, head, position]
                    elif ring and position >= length - ring:
                        slot = (position - layout.sink) % ring
                        first = side.offsets[head] + slot * side.rows[head]
                        codes[sample, first : first + side.rows[head]] = vectors.rows[sample][head][position]
                        if side.bits[head] < 16:
                            at = side.scale_offsets[head] + slot
                            scales[sample, at] = vectors.scales[sample, head, position]
    return stored
