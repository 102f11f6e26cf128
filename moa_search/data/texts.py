"""Long texts and their splits: those every Python installation carries, and those a user brings.

The standard library's help topics and source files need no hub and no download. No text is shared between
calibration, validation and test, whatever its source.
"""

from __future__ import annotations

import functools
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moa_search.errors import CalibrationError, ConfigError

Tokens = npt.NDArray[np.int64]
Document = tuple[str, str]
"""Name and text."""
Split = Literal["calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = ("calibration", "validation", "test")

MODULES = """
_pydecimal _pyio argparse ast asyncio/base_events asyncio/tasks bdb calendar cgi codecs collections/__init__
concurrent/futures/process configparser contextlib copy csv ctypes/util dataclasses difflib dis doctest
email/message enum fractions ftplib functools gettext gzip heapq html/parser http/client http/cookiejar
http/server imaplib inspect ipaddress json/decoder locale logging/__init__ logging/handlers lzma mailbox
mimetypes multiprocessing/managers multiprocessing/pool nntplib ntpath optparse os pathlib pdb pickle
pickletools platform plistlib poplib posixpath pprint profile pstats pydoc queue random re/_parser sched
selectors shelve shlex shutil smtplib socket socketserver sqlite3/dump ssl statistics string subprocess
symtable sysconfig tarfile telnetlib tempfile textwrap threading timeit tkinter/__init__ tkinter/ttk tokenize
trace traceback tracemalloc turtle types typing unittest/case unittest/mock urllib/parse urllib/request uuid
warnings wave weakref webbrowser xml/dom/minidom xml/etree/ElementTree xmlrpc/client zipfile
"""
"""Long modules of the standard library, as paths without ``.py``."""

_FIFTHS: dict[Split, tuple[int, ...]] = {"calibration": (0, 2), "validation": (3,), "test": (1, 4)}

REPEATED_CHARACTERS = 100
"""Length from which a paragraph found in two splits counts as shared text; help topics quote each other."""


@functools.cache
def documents(split: Split) -> tuple[Document, ...]:
    """The standard library's texts of one split, in a fixed order.

    A text's name alone decides its split, so that it never changes sides between Python versions. Modules that
    this version lacks are left out, so the texts can differ between versions; profiles record a hash of the
    tokens they were made from.
    """
    return of_split(_library(), split, key=lambda name, text: name)


def of_split(texts: Sequence[Document], split: Split, key: Callable[[str, str], str]) -> tuple[Document, ...]:
    """Those of ``texts`` that belong to ``split``, in their order: the one rule that decides sides.

    A hash of a text's key decides its side. A text that repeats a paragraph of an earlier split (in the order of
    `SPLITS`) is left out.

    Args:
        texts: Names and texts.
        split: Which side.
        key: What of a name and text decides; equal keys are on the same side.
    """
    taken: set[str] = set()
    for side in SPLITS:
        mine = tuple(
            (name, text)
            for name, text in texts
            if zlib.crc32(key(name, text).encode()) % 5 in _FIFTHS[side] and taken.isdisjoint(_paragraphs(text))
        )
        if side == split:
            return mine
        taken.update(paragraph for _, text in mine for paragraph in _paragraphs(text))
    raise ConfigError(f"split {split!r} is unknown; choose from {', '.join(SPLITS)}")


def squeezed(text: str) -> str:
    """``text`` with single spaces for any white space."""
    return " ".join(text.split())


def _library() -> list[Document]:
    """``(name, text)`` of every text in this Python installation, whatever its split."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    found = [(f"topic:{name}", text) for name, text in sorted(topics.items())]
    for module in MODULES.split():
        path = library / f"{module}.py"
        if path.is_file():
            found.append((f"module:{module}", path.read_text(encoding="utf-8", errors="replace")))
    return found


def _paragraphs(text: str) -> set[str]:
    paragraphs = (squeezed(paragraph) for paragraph in text.replace("\r\n", "\n").split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= REPEATED_CHARACTERS}


def encode(tokenizer: Any, text: str) -> Tokens:
    """Token ids of ``text`` alone, ``[tokens]``: no special token is added."""
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


class TextSource:
    """Cuts stretches of an exact number of tokens out of texts.

    A text is tokenised when it is first used.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: Names and texts, at least one of them not empty.
        label: What the texts are called in errors.
        joint: Stands between two texts where one is too short.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[Document], label: str, *, joint: str = "") -> None:
        self._tokenizer = tokenizer
        self._texts = texts
        self._label = label
        sizes = np.array([len(text) for _, text in texts], dtype=float)
        self._shares = sizes / sizes.sum()
        self._tokens: dict[int, Tokens] = {}
        self._joint = self._encode(joint)

    @classmethod
    def library(cls, tokenizer: Any, split: Split) -> TextSource:
        """The standard library's texts of one split."""
        return cls(tokenizer, documents(split), f"the standard library's {split} texts")

    def cut(self, length: int, rng: np.random.Generator, *, without: str | None = None) -> tuple[str, Tokens]:
        """A stretch of ``length`` tokens, ``[length]``, and the name of the text it starts in.

        Short texts are followed by the next ones.

        Args:
            length: Tokens wanted.
            rng: Where to start.
            without: Name of a text that is passed over.

        Raises:
            CalibrationError: The texts hold fewer tokens.
        """
        count = len(self._texts)
        first = int(rng.choice(count, p=self._shares))
        order = [i for i in ((first + step) % count for step in range(count)) if self._texts[i][0] != without]
        parts: list[Tokens] = []
        missing = length
        for position, index in enumerate(order):
            if position and missing <= 0:
                break
            here = self._encoded(index)
            start = 0 if position else int(rng.integers(0, max(1, len(here) - length + 1)))
            if position:
                parts.append(self._joint[:missing])
                missing -= len(parts[-1])
            parts.append(here[start : start + missing])
            missing -= len(parts[-1])
        if missing > 0:
            raise CalibrationError(
                f"{length} tokens of text are needed; {self._label} have {length - missing}; "
                "give more text or a shorter length"
            )
        return self._texts[order[0]][0] if order else "", np.concatenate([np.empty(0, np.int64), *parts])

    def _encoded(self, index: int) -> Tokens:
        if index not in self._tokens:
            self._tokens[index] = self._encode(self._texts[index][1])
        return self._tokens[index]

    def _encode(self, text: str) -> Tokens:
        return encode(self._tokenizer, text)
