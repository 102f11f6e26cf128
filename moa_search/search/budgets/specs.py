"""What users ask for, in their own units: one line of text per budget, read into exact fractions.

``docs/budgets.md`` explains the grammar: ``density=0.25@2048``, ``tokens=512@8192``, ``kv=2GiB@32768x8``,
``memory=24GiB@32kx4``, ``decode=12ms@32kx8``, ``prefill=900ms@32k``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest, one_line
from moa_search.search.budgets.cost_model import PICOSECONDS
from moa_search.spans import MAX_LENGTH

_BYTES = {"B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("iB", 1024), ("B", 1000))
    for power, prefix in enumerate("KMGT", start=1)
}
_TIMES = {"us": PICOSECONDS // 10**6, "ms": PICOSECONDS // 10**3, "s": PICOSECONDS}
_UNITS: Final[dict[str, dict[str, int]]] = {
    "density": {"": 1},
    "tokens": {"": 1},
    "kv": _BYTES,
    "memory": _BYTES,
    "decode": _TIMES,
    "prefill": _TIMES,
    "share": {"": 1},
}
"""Units of each kind of budget: shares, tokens, bytes and picoseconds are what amounts are kept in."""

_EXAMPLES: Final = {
    "density": "density=0.25@2048",
    "tokens": "tokens=512@8192",
    "kv": "kv=2GiB@32768x8",
    "memory": "memory=24GiB@32768x4",
    "decode": "decode=12ms@32768x8",
    "prefill": "prefill=900ms@32768",
    "share": "share=0.125@2048",
}
TOKEN_KINDS = ("density", "tokens")
BYTE_KINDS = ("share", "kv", "memory")
PER_SAMPLE = (*TOKEN_KINDS, "share")
_VALUE = re.compile(r"([0-9]{1,24}(?:\.[0-9]{0,24})?|\.[0-9]{1,24})\s*([A-Za-z]*)")
_PLACE = re.compile(r"([0-9]{1,12})([kK]?)(?:\s*[xX]\s*([0-9]{1,12}))?")

MAX_BATCH = 2**20
SHOWN_DIGITS = 4


@dataclass(frozen=True)
class BudgetSpec:
    """What a user asks for.

    Attributes:
        kind: ``density``, ``tokens``, ``share`` (of a 16-bit cache's bytes), ``kv``, ``memory``,
            ``decode`` or ``prefill``.
        amount: At most this: a share, mean tokens per KV head, bytes or picoseconds.
        unit: The unit that the user thinks in, for messages.
        length: Tokens per sample.
        batch: Samples together; 1 for densities and tokens, which don't depend on it.
        text: As the user wrote it.
    """

    kind: str
    amount: Fraction
    unit: str
    length: int
    batch: int
    text: str

    def __post_init__(self) -> None:
        if not self.amount > 0:
            self._refuse("the amount must be over 0")
        if self.kind in ("density", "share") and self.amount > 1:
            self._refuse(f"a {self.kind} is at most 1")
        if not 1 <= self.length <= MAX_LENGTH:
            self._refuse(f"the length must lie in 1..{MAX_LENGTH} tokens")
        if not 1 <= self.batch <= MAX_BATCH:
            self._refuse(f"the batch must lie in 1..{MAX_BATCH}")
        if self.kind in PER_SAMPLE and self.batch != 1:
            self._refuse("what each sample keeps doesn't depend on the batch, so name none")

    @classmethod
    def density(cls, density: float, length: int) -> BudgetSpec:
        """A share of the KV cache at ``length`` tokens, taken as the decimal number that the float prints as.

        Raises:
            ConfigError: It isn't in (0, 1].
        """
        return cls._part("density", density, length, option="density")

    @classmethod
    def share(cls, share: float, length: int) -> BudgetSpec:
        """A share of a 16-bit KV cache's bytes at ``length`` tokens, likewise.

        Raises:
            ConfigError: It isn't in (0, 1].
        """
        return cls._part("share", share, length, option="kv_share")

    @classmethod
    def _part(cls, kind: str, part: float, length: int, *, option: str) -> BudgetSpec:
        if not 0 < part <= 1:
            raise ConfigError(f"{option} {part:g} is out of range; it must be over 0 and at most 1")
        decimal = repr(float(part))
        return cls(kind, Fraction(decimal), "", length, 1, f"{kind}={decimal}@{length}")

    @classmethod
    def parse(cls, text: str) -> BudgetSpec:
        """Read ``kind=amount@length`` or ``kind=amount@lengthxbatch``.

        Raises:
            ConfigError: It isn't of that form; the message says what is wrong and gives an example.
        """
        text = text.strip()
        kind, equals, rest = (part.strip() for part in text.partition("="))
        if not equals:
            raise ConfigError(
                f"budget '{one_line(text)}' names no kind; write one like {', '.join(_EXAMPLES.values())}"
            )
        if kind not in _UNITS:
            raise ConfigError(
                f"budget '{one_line(text)}': '{one_line(kind)}' is no kind of budget{nearest(kind, _UNITS)}; "
                f"it's one of {', '.join(_UNITS)}, as in {_EXAMPLES['kv']}"
            )
        amount, at, place = (part.strip() for part in rest.partition("@"))
        if not at:
            raise _wrong(text, kind, "it names no length")
        value, where = _VALUE.fullmatch(amount), _PLACE.fullmatch(place)
        if not value:
            raise _wrong(text, kind, f"'{one_line(amount)}' is no amount")
        if not where:
            raise _wrong(text, kind, f"'{one_line(place)}' is no length, nor length and batch")
        number, unit = Fraction(value[1]), _unit(value[2], kind, text)
        length = int(where[1]) * (1024 if where[2] else 1)
        return cls(kind, number * _UNITS[kind][unit], unit, length, int(where[3] or 1), text)

    def show(self, amount: Fraction, *, up: bool) -> str:
        """An amount in the user's unit with about four digits, rounded up or down."""
        value, decimals = amount / _UNITS[self.kind][self.unit], 0
        while decimals < 18 and value * 10**decimals < 10 ** (SHOWN_DIGITS - 1):
            decimals += 1
        digits = (math.ceil if up else math.floor)(value * 10**decimals)
        whole, part = divmod(digits, 10**decimals)
        fraction = f"{part:0{decimals}d}".rstrip("0") if part else ""
        return f"{whole}{'.' if fraction else ''}{fraction}{self.unit}"

    def _refuse(self, why: str) -> None:
        raise _wrong(self.text, self.kind, why)


def _unit(written: str, kind: str, text: str) -> str:
    """The unit as this library writes it; case doesn't matter."""
    units = _UNITS[kind]
    for unit in units:
        if unit.lower() == written.lower():
            return unit
    known = ", ".join(units)
    if not written:
        raise _wrong(text, kind, f"it names no unit ({known})")
    if "" in units:
        raise _wrong(text, kind, f"it takes no unit such as '{written}'")
    raise _wrong(text, kind, f"'{one_line(written)}' is no unit{nearest(written, units)}; it's one of {known}")


def _wrong(text: str, kind: str, why: str) -> ConfigError:
    return ConfigError(f"budget '{one_line(text)}': {why}; expected a form like {_EXAMPLES[kind]}")
