"""Draws are the same, byte for byte, as they were in every version before: profiles and kept scores name them."""

import random

import numpy as np
import pytest

from moa_search.data import hash_samples
from moa_search.data.frames import chat_frame
from moa_search.data.loading import Record
from moa_search.data.texts import TextSource
from moa_search.formats.files import sha256_of
from moa_search.tasks import SOURCE_TASKS, TASKS
from moa_search.tasks.items import Generator
from moa_search.tasks.records import RecordTask
from moa_search.tasks.turns import draw_round
from tests.moa_search.bytewise import WORDS


def texts():
    """Three texts of our own: the standard library's differ between Python versions."""
    for name in ("one", "two", "three"):
        rng = random.Random(name)
        yield name, "\n\n".join(" ".join(rng.choices(WORDS, k=40)) + f" {n}." for n in range(60))


def drawn(task, tokenizer, frame):
    filler = TextSource(tokenizer, list(texts()), "texts of our own", joint="\n\n")
    if isinstance(task, RecordTask):
        filler = task.texts(tokenizer)
    maker = Generator(task, tokenizer, filler, frame)
    found = []
    for seed, length in ((0, 900), (7, 1601)):
        for depths in ((), (0.0, 0.5, 1.0)):
            items = draw_round({task.name: maker}, [task.name] * 5, length, seed, depths=depths)[task.name]
            found += [item.answered(item.reference) for item in items]
    places = np.array([sample.depth for sample in found]).round(9).tobytes()
    return sha256_of(hash_samples(found).encode(), places).removeprefix("sha256:")[:16]


def records():
    return RecordTask(
        [
            Record(
                f"d{n}",
                " ".join(random.Random(n).choices(WORDS, k=30)) + f" The code is K{n:03}.",
                f"Which is {n}?",
                (f"K{n:03}",),
            )
            for n in range(40)
        ],
        "records of our own",
    )


HASHES = {
    "passkey": ["f13e6d898b6f0e6f", "53a9fd8e1ba51727"],
    "copy": ["0b3e624749baabff", "0b3e624749baabff"],
    "multikey": ["4d9b5248d149ef82", "fc3235d3df117aa0"],
    "question": ["46589b529bcb2bdd", "13825f86add91dca"],
    "lines": ["eb194b2300dd25f1", "eafedea77b6a84da"],
    "lookup": ["e9d70686d0bc38f1", "be2e6ae15cdf23e8"],
    "tracking": ["f367ffdc4d088124", "77160a30f447b9d3"],
    "turns": ["86889e007512cccd", "86889e007512cccd"],
    "perplexity": ["d3139010798bed47", "d3139010798bed47"],
    "records": ["980c8812be60d09d", "d63bbd38d97ddd87"],
}
"""In plain text and in a chat."""


@pytest.mark.parametrize("name", [*TASKS, "records"])
def test_draws_are_those_of_earlier_versions(name, chat_tokenizer):
    made = [
        drawn(TASKS[name] if name in TASKS else records(), chat_tokenizer, frame)
        for frame in (None, chat_frame(chat_tokenizer))
    ]
    assert made == HASHES[name]


def test_every_task_is_watched():
    assert set(HASHES) == {*TASKS, "records"} >= set(SOURCE_TASKS)
