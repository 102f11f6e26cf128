"""Long texts that every Python installation carries: the standard library's help topics and source files.

No hub and no download is needed, and no text is shared between calibration, validation and test.
"""

from __future__ import annotations

import functools
import sysconfig
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moa_search.errors import CalibrationError

__all__ = ["SPLITS", "Split", "TextSource", "documents"]

Tokens = npt.NDArray[np.int64]
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
"""A text's name alone decides its split, so that it never changes sides between Python versions."""


REPEATED_CHARACTERS = 100
"""Length from which a paragraph found in two splits counts as shared text; help topics quote each other."""


@functools.cache
def documents(split: Split) -> tuple[tuple[str, str], ...]:
    """``(name, text)`` of the texts of one split, in a fixed order.

    A text that repeats a paragraph of an earlier split (in the order of `SPLITS`) is left out. So are modules
    that this Python version lacks, so the texts can differ between versions; profiles record a hash of the
    tokens they were made from.
    """
    earlier = SPLITS[: SPLITS.index(split)]
    taken = {paragraph for other in earlier for _, text in documents(other) for paragraph in _paragraphs(text)}
    return tuple(
        (name, text)
        for name, text in _library()
        if zlib.crc32(name.encode()) % 5 in _FIFTHS[split] and taken.isdisjoint(_paragraphs(text))
    )


def _library() -> list[tuple[str, str]]:
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
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= REPEATED_CHARACTERS}


class TextSource:
    """Cuts stretches of an exact number of tokens out of the texts of one split.

    A text is tokenised when it is first used.

    Args:
        tokenizer: A Hugging Face tokenizer.
        split: Which texts to use.
    """

    def __init__(self, tokenizer: Any, split: Split) -> None:
        self.split = split
        self._tokenizer = tokenizer
        self._documents = documents(split)
        sizes = np.array([len(text) for _, text in self._documents], dtype=float)
        self._shares = sizes / sizes.sum()
        self._tokens: dict[int, Tokens] = {}

    def cut(self, length: int, rng: np.random.Generator) -> tuple[str, Tokens]:
        """A stretch of ``length`` tokens, ``[length]``, and the name of the text it starts in.

        Short texts are followed by the next ones, never beyond the split.

        Raises:
            CalibrationError: The split holds fewer tokens.
        """
        first = int(rng.choice(len(self._shares), p=self._shares))
        here = self._encoded(first)
        start = int(rng.integers(0, max(1, len(here) - length + 1)))
        parts = [here[start : start + length]]
        missing = length - len(parts[0])
        for step in range(1, len(self._documents)):
            if missing <= 0:
                break
            parts.append(self._encoded((first + step) % len(self._documents))[:missing])
            missing -= len(parts[-1])
        if missing > 0:
            raise CalibrationError(
                f"{length} tokens of text are needed; the standard library's {self.split} texts have {length - missing}"
            )
        return self._documents[first][0], np.concatenate(parts)

    def _encoded(self, index: int) -> Tokens:
        if index not in self._tokens:
            encoded = self._tokenizer(self._documents[index][1], add_special_tokens=False, verbose=False)
            self._tokens[index] = np.asarray(encoded["input_ids"], dtype=np.int64)
        return self._tokens[index]
