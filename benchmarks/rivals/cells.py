"""What the table of rivals measures, in order of importance. Both environments import it: the standard library alone.

See README.md beside this file.
"""

from __future__ import annotations

import gzip
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RETRIEVAL = ("passkey", "copy", "multikey")
SHARES = ("0.25", "0.125")

CACHES = ("quantized-cache-4", "quantized-cache-2")


def at_shares(*names: str) -> tuple[str, ...]:
    """Methods at each share of the tokens, those that share most work side by side."""
    return tuple(f"{name}@{share}" for name in names for share in SHARES)


FULL = ("full",)
UNKNOWN = (
    *(*FULL, *CACHES, *at_shares("streaming-llm", "snapkv", "expected-attention", "tova", "keydiff", "compactor")),
    *at_shares("adakv+snapkv", "adakv+compactor", "kvzip", "kvzip-head", "duo-attention"),
    *("kvzip-layer@0.25", "kvzip@0.0625"),
)
KNOWN = at_shares("snapkv", "tova", "expected-attention", "adakv+snapkv")
"""Methods that look at a question which they are shown; the others keep the same tokens but for a few."""
FEWER = (*FULL, CACHES[0], *at_shares("snapkv", "kvzip"), "adakv+compactor@0.25", "duo-attention@0.25")

CODED = ("int8", "int4", "int4-plain")
BYTES = ("quarter-bytes", "eighth-bytes", "sixteenth-bytes")
SPANS = ("half", "quarter", "eighth", "eighth-tuned")
UNIFORM = ("uniform like half", "uniform like quarter", "uniform like eighth")
MOA = ("moa-0.5", "moa-0.25", "moa-0.125")
AHEAD = ("ahead-0.5", "ahead-0.25", "ahead-0.125", "bits-ahead-0.25", "bits-ahead-0.125", "bits-ahead-0.0625")
"""Plans that look ahead to every doubling up to 8192 tokens, where the shipped ones look to 4096."""
PLANS = ("dense", *CODED, *BYTES, *SPANS)
BOARD = ("dense", "int4", *BYTES, "quarter")
"""Plans beside `FEWER` rivals on boards that others publish."""
GEMMA = ("dense", "int8", "int4", *(f"gemma-{share}" for share in (50, 25, 12)))
"""Of Gemma 3 270M, with plans at shares of the bytes of the layers that have no window of their own."""

SPARE_TOKENS = 16
"""Tokens that a generated answer may have beyond one that holds all that is wanted; RULER's room is up to 128."""


@dataclass(frozen=True)
class Stage:
    """Items and what answers them.

    Attributes:
        name: Of the stage.
        items: How many, by task and length.
        here: Variants of this project.
        unknown: Rivals of the other environment that compress before the question is known.
        known: Those that see it.
        generated: Whether answers are generated.
        first: Number of the first item of each; those before it are another stage's.
    """

    name: str
    items: dict[tuple[str, int], int]
    here: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    generated: bool = False
    first: int = 0


NIAH = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")
RULER = tuple(
    f"ruler:{name}" for name in (*NIAH, "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2")
)

FOUND = tuple(f"ruler:{name}" for name in (*NIAH[:5], "niah_multivalue"))
"""Needles of which dense attention finds a quarter or more at 1,024 tokens, by RULER's score of four items each."""


def grid(tasks: tuple[str, ...], counts: dict[int, int]) -> dict[tuple[str, int], int]:
    """The same number of items of each task at a length."""
    return {(task, length): count for length, count in counts.items() for task in tasks}


WINDOW_SPANS = (256, 512, 1024)
WINDOWS = {("passkey", round(span * step)): 40 for span in WINDOW_SPANS for step in (1.0625, 1.125, 1.25)}
"""How far a constant window finds passkeys: a little farther than it is long."""

BY_TORCH = " by torch"
"""Ends the names of variants that run by the plain references, to check the kernels with."""

DRAWN = {
    **grid(("passkey", "copy"), {1024: 40, 2048: 40, 4096: 24, 8192: 24}),
    **grid(("multikey",), {1024: 40, 2048: 40, 4096: 16, 8192: 16}),
    **grid(("passkey",), {512: 40, 3072: 24, 6144: 24}),
    **WINDOWS,
    **grid(("turns",), {1024: 24, 2048: 24, 4096: 16, 8192: 16}),
    **grid(RULER, {1024: 8, 2048: 4}),
}
"""Items of each task and length; stages answer the first of them."""

EQUAL = (*PLANS, *UNIFORM, *MOA)
STAGES = (
    Stage("check", {("passkey", 1024): 8}, tuple(f"{name}{BY_TORCH}" for name in ("quarter-bytes", "quarter"))),
    Stage("first", grid(RETRIEVAL, {1024: 16, 2048: 16, 4096: 16, 8192: 16}), EQUAL, UNKNOWN, KNOWN),
    Stage("short", grid(RETRIEVAL, {1024: 40, 2048: 40}), EQUAL, UNKNOWN, KNOWN, first=16),
    Stage("longer", grid(("passkey", "copy"), {4096: 24, 8192: 24}), PLANS, first=16),
    Stage("ahead", grid(("passkey", "copy"), {4096: 24, 8192: 24}), AHEAD),
    Stage("reach", grid(("passkey",), {512: 24, 3072: 24, 6144: 24}), (*PLANS, *MOA)),
    Stage("windows", WINDOWS, ("dense", *(f"window {span}" for span in WINDOW_SPANS))),
    Stage("ruler-dense", grid(RULER, {1024: 4}), ("dense",), generated=True),
    Stage("turns", grid(("turns",), {1024: 12}), BOARD, FEWER, ("snapkv@0.25",)),
    Stage("ruler", grid(FOUND, {1024: 8}), BOARD, FEWER, ("snapkv@0.25",), generated=True),
    Stage("gemma", grid(("passkey", "copy"), {1024: 8}), GEMMA),
    Stage("turns-4k", grid(("turns",), {4096: 6}), BOARD, FEWER, ("snapkv@0.25",)),
    Stage("ruler-2k", grid(FOUND, {2048: 4}), BOARD, FEWER, ("snapkv@0.25",), generated=True),
)


def read_items(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Items as `draw.py` writes them, and texts for calibration."""
    with gzip.open(path, "rt") as file:
        first, *lines = map(json.loads, file)
    return lines, first["texts"]


def of_stage(items: list[dict[str, Any]], stage: Stage) -> Iterator[dict[str, Any]]:
    """A stage's items: the first of every task and length, then the second ones."""
    counts = stage.items
    wanted = [item for item in items if stage.first <= item["number"] < counts.get((item["task"], item["length"]), 0)]
    for item in sorted(wanted, key=lambda item: int(item["number"])):
        fitting = {**item}
        if stage.generated:
            fitting["generate"] = min(item["room"], len(item["answer"]) + SPARE_TOKENS)
        yield fitting


def machine(device: str) -> dict[str, Any]:
    """What an answer says of where it was computed: versions of libraries, and the device."""
    import torch

    versions = {name: version(name) for name in ("torch", "transformers")}
    if device == "cuda":
        return {"versions": versions, "device": torch.cuda.get_device_name()}
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1].strip() if found else platform.machine()
    return {"versions": versions, "device": f"CPU, {name}, {torch.get_num_threads()} thread(s)"}


def is_enough(tokenizer: Any, given: list[int], item: dict[str, Any]) -> bool:
    """Whether a generated answer is at its end: by its length, by its end token, or as it holds all that is wanted.

    RULER's score can't tell what holds all from more.
    """
    if len(given) >= item["generate"] or given[-1:] == [tokenizer.eos_token_id]:
        return True
    text = tokenizer.decode(given, skip_special_tokens=True).lower()
    return all(one.lower() in text for one in item["texts"])


def mine(things: list[Any], shard: int, shards: int) -> list[Any]:
    """Every ``shards``-th thing; the place moves on, so that no process gets all of a kind."""
    return [thing for at, thing in enumerate(things) if (at + at // shards) % shards == shard]
