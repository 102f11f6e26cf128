"""Something short is hidden in long text and asked for at its end: a passkey, one of several, a fact, a chain.

Answers need text from far away. Items have exactly the length asked for, and the supervised tokens are known by
construction.
"""

from __future__ import annotations

import numpy as np

from moa_search.tasks.base import ExactMatchTask, TokenAccuracyTask
from moa_search.tasks.facts import FACTS, NAMES
from moa_search.tasks.items import Asking, Generator, Item

LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
LETTERS_PER_NAME = 5


class PasskeyTask(ExactMatchTask):
    """A five-digit passkey hidden in text (Mohtashami and Jaggi, 2023, arXiv 2305.16300)."""

    name = "passkey"

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`."""
        key = int(rng.integers(10_000, 100_000))
        needle = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
        asking = Asking("\n\nWhat is the pass key?", " The pass key is", (f" {key}",))
        return maker.hide([(depth, needle)], asking, length, rng)


class MultikeyTask(ExactMatchTask):
    """Passkeys of several people at random depths; one of them is asked for (RULER's multi-key retrieval)."""

    name = "multikey"
    keys = 3

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`; ``depth`` is that of the key asked for."""
        names = rng.choice(NAMES, self.keys, replace=False).tolist()
        keys = (10_000 + rng.choice(90_000, self.keys, replace=False)).tolist()
        depths = [depth, *rng.random(self.keys - 1).tolist()]
        needles = [
            (at, f"\n\nThe pass key of {name} is {key}. Remember it. {key} is the pass key of {name}.\n\n")
            for at, name, key in zip(depths, names, keys, strict=True)
        ]
        asked = f"the pass key of {names[0]}"
        asking = Asking(f"\n\nWhat is {asked}?", f" The{asked[3:]} is", (f" {keys[0]}",))
        return maker.hide(needles, asking, length, rng)


class QuestionTask(ExactMatchTask):
    """A fact told in the first half of a long document and asked for at its end: where, when, what, who.

    Answered freely in a chat; plain text begins the answer, so that a base model goes on with it.
    """

    name = "question"

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`; ``depth`` is halved, so that the fact is far from its question."""
        fact = FACTS[int(rng.integers(len(FACTS)))]
        subject, value = str(rng.choice(fact.subjects)), str(rng.choice(fact.values))
        statement = fact.statement.format(s=subject, v=value)
        asking = Asking(
            question=f"\n\nQuestion: {fact.question.format(s=subject)}",
            lead=f"\nAnswer: {statement.removesuffix(f' {value}.')}",
            answers=(f" {value}",),
            free=maker.frame.is_chat,
        )
        return maker.hide([(depth / 2, f"\n\n{statement}\n\n")], asking, length, rng)


class TrackingTask(TokenAccuracyTask):
    """A number is given to a variable, and that one to the next, with text between; all of them are asked for.

    RULER's variable tracking (arXiv 2404.06654) with one chain of `hops` assignments after the first.
    """

    name = "tracking"
    hops = 4

    def draw(self, maker: Generator, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `DrawnTask.draw`; ``depth`` is that of the first assignment, the others follow it anywhere."""
        names = _distinct_names(self.hops + 1, rng)
        value = int(rng.integers(10_000, 100_000))
        depths = [depth, *sorted(rng.uniform(depth, 1, self.hops).tolist())]
        given = [str(value), *(f"VAR {name}" for name in names)]
        needles = [
            (at, f"\n\nVAR {name} = {source}\n\n") for at, name, source in zip(depths, names, given, strict=False)
        ]
        asking = Asking(
            f"\n\nWhich variables have the value {value}?",
            f" These {len(names)} variables have the value {value}:",
            (f" {' '.join(names)}",),
        )
        return maker.hide(needles, asking, length, rng)


def _distinct_names(count: int, rng: np.random.Generator) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choice(LETTERS, LETTERS_PER_NAME))
        if name not in names:
            names.append(name)
    return names
