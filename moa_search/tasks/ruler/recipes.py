"""RULER's thirteen tasks, made by its published recipe (Hsieh et al. 2024, arXiv 2404.06654, appendices B and C).

Wording, counts, worked examples and room for answers are RULER's; texts and words are this project's: essays are the
standard library's texts, words are theirs, and questions are about facts stated among passages of them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from uuid import UUID

import numpy as np

from moa_search.data.texts import Document
from moa_search.tasks.facts import FACTS
from moa_search.tasks.ruler.records import RulerRecord, numbered

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE_WORDS = 30
WORD_LETTERS = range(4, 11)
CODED_LETTERS = 6
ZETA = 2.0
ZETA_SUM = np.pi**2 / 6
"""Of all weights of Zipf's law with exponent `ZETA`."""
TOKENS_PER_CODED_WORD = 50
"""Tokens of an item for each word of the vocabulary of coded text."""
COMMON_WORDS = 10
LONG_TOKENS = 4096
"""From this length on common words are repeated as often as in RULER's paper; shorter lists have no room."""
EXAMPLE_NOISE = 12
"""Blocks of noise in the worked example of variable tracking, which RULER gives 500 tokens."""


class Texts:
    """What recipes draw from.

    Args:
        documents: Names and texts.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self._texts = [text for _, text in documents]

    @cached_property
    def sentences(self) -> list[str]:
        """All sentences but the longest, which are code or tables, in the order of the texts."""
        found = (part.strip() for text in self._texts for part in re.split(r"(?<=[.!?])\s+", " ".join(text.split())))
        return [sentence for sentence in found if 2 < len(sentence.split()) <= SENTENCE_WORDS]

    @cached_property
    def words(self) -> list[str]:
        """All short words of lower-case letters, each once."""
        found = {word for text in self._texts for word in re.findall(r"\b[a-z]+\b", text)}
        return sorted(word for word in found if len(word) in WORD_LETTERS)

    def essay(self, count: int, rng: np.random.Generator) -> list[str]:
        """``count`` sentences that follow each other, from anywhere."""
        first = int(rng.integers(len(self.sentences)))
        return [self.sentences[(first + step) % len(self.sentences)] for step in range(count)]


@dataclass(frozen=True)
class Recipe(ABC):
    """One of the tasks.

    Attributes:
        name: RULER's.
        room: Tokens for the answer.
    """

    name: str
    room: int

    @abstractmethod
    def record(self, texts: Texts, size: int, length: int, seed: Sequence[int]) -> RulerRecord:
        """One record; the same seed gives the same question and answer whatever the size.

        Args:
            texts: See `Texts`.
            size: How much of what surrounds the sought: sentences, needles, words or documents, at least 1.
            length: Tokens of the whole item, which some counts depend on.
            seed: For everything drawn.
        """

    def _record(self, context: str, question: str, prefix: str, answer: Sequence[str]) -> RulerRecord:
        return RulerRecord(f"{context}\n", question, prefix, tuple(answer), self.room, self.name)


@dataclass(frozen=True)
class Needles(Recipe):
    """Needle in a haystack: keys with values hidden in text, some of them asked for.

    Attributes:
        haystack: ``noise``, ``essay`` or ``needle``, which is other needles.
        key_kind: Of keys: ``words`` or ``uuids``.
        value_kind: Of values: ``numbers`` or ``uuids``.
        keys: How many are hidden.
        values: Of each key asked for.
        queries: Keys asked for.
    """

    haystack: str = "essay"
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def record(self, texts: Texts, size: int, length: int, seed: Sequence[int]) -> RulerRecord:
        """See `Recipe.record`."""
        rng, around = np.random.default_rng([*seed, 0]), np.random.default_rng([*seed, 1])
        keys = [self._key(texts, rng) for _ in range(max(self.keys, self.queries))]
        values = [[self._value(rng) for _ in range(self.values)] for _ in keys]
        needles = [self._needle(key, value) for key, given in zip(keys, values, strict=True) for value in given]
        if self.haystack == "noise":
            hay, joint = [NOISE] * size, "\n"
        elif self.haystack == "essay":
            hay, joint = texts.essay(size, around), " "
        else:
            hay, joint = [self._needle(self._key(texts, around), self._value(around)) for _ in range(size)], "\n"
        text = joint.join(_hidden(hay, needles, np.random.default_rng([*seed, 2])))
        asked = keys[: self.queries]
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        kind = {"numbers": "number", "uuids": "uuid"}[self.value_kind]
        one = self.queries * self.values == 1
        hidden = f"A special magic {kind} is" if one else f"Some special magic {kind}s are"
        what = kind if one else f"{kind}s"
        context = (
            f"{hidden} hidden within the following text. Make sure to memorize it. I will quiz you about the {what} "
            f"afterwards.\n{text}"
        )
        verb = "is" if one else "are"
        question = (
            f"What {verb} {'' if one else 'all '}the special magic {what} for {query} mentioned in the provided text?"
        )
        prefix = f" The special magic {what} for {query} mentioned in the provided text {verb}"
        return self._record(context, question, prefix, [value for given in values[: self.queries] for value in given])

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value_kind} for {key} is: {value}."

    def _key(self, texts: Texts, rng: np.random.Generator) -> str:
        if self.key_kind == "uuids":
            return _uuid(rng)
        return "-".join(texts.words[number] for number in rng.integers(len(texts.words), size=2).tolist())

    def _value(self, rng: np.random.Generator) -> str:
        return str(rng.integers(1_000_000, 10_000_000)) if self.value_kind == "numbers" else _uuid(rng)


@dataclass(frozen=True)
class Tracking(Recipe):
    """Variable tracking: a chain of assignments in noise, after a worked example.

    Attributes:
        hops: Assignments after the first.
    """

    hops: int = 4

    def record(self, texts: Texts, size: int, length: int, seed: Sequence[int]) -> RulerRecord:
        """See `Recipe.record`."""
        sought = np.random.default_rng([*seed, 0]), np.random.default_rng([*seed, 2])
        context, question, prefix, names = self._asked(size, 5, *sought)
        example = np.random.default_rng([*seed, 3])
        *worked, variables = self._asked(EXAMPLE_NOISE, 3, example, example)
        shown = "\n".join([worked[0], worked[1] + worked[2] + f" {' '.join(variables)}"])
        return self._record(f"{shown}\n\n{context}", question, prefix, names)

    def _asked(
        self, size: int, letters: int, rng: np.random.Generator, places: np.random.Generator
    ) -> tuple[str, str, str, list[str]]:
        """Text with one chain of names of some letters, the question about it, how its answer begins, and the names."""
        alphabet = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(rng.choice(alphabet, letters))
            names += [name] if name not in names else []
        value = str(rng.integers(10_000, 100_000))
        given = [value, *(f"VAR {name}" for name in names)]
        chain = [f"VAR {name} = {source}" for name, source in zip(names, given, strict=False)]
        text = "\n".join(_hidden([NOISE] * size, chain, places, in_order=True))
        context = f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}"
        question = f"Question: Find all variables that are assigned the value {value} in the text above."
        prefix = (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:"
        )
        return context, question, prefix, names


@dataclass(frozen=True)
class CommonWords(Recipe):
    """The ten words of a list that stand in it most often, after a worked example with a list of its own.

    They stand in it 30 times and the others 3 times; 6 and 1 in short lists.
    """

    def record(self, texts: Texts, size: int, length: int, seed: Sequence[int]) -> RulerRecord:
        """See `Recipe.record`; ``size`` is how many other words there are."""
        is_long = length >= LONG_TOKENS
        order = np.random.default_rng([*seed, 0]).permutation(len(texts.words))[: COMMON_WORDS + size]
        words = [texts.words[number] for number in order.tolist()]
        asked, question, prefix = self._asked(words, (30, 3) if is_long else (6, 1), np.random.default_rng([*seed, 2]))
        example = np.random.default_rng([*seed, 3])
        chosen = example.permutation(len(texts.words))[: 40 if is_long else 20].tolist()
        shown = [texts.words[number] for number in chosen]
        worked = self._asked(shown, (10, 3) if is_long else (3, 1), example)
        answered = f"{worked[0]}\n{worked[1]}{worked[2]} {numbered(shown[:COMMON_WORDS])}"
        return self._record(f"{answered}\n{asked}", question, prefix, words[:COMMON_WORDS])

    def _asked(self, words: list[str], times: tuple[int, int], rng: np.random.Generator) -> tuple[str, str, str]:
        """The list of words, the question about it, and how its answer begins."""
        often, seldom = times
        listed = rng.permutation(words[:COMMON_WORDS] * often + words[COMMON_WORDS:] * seldom).tolist()
        context = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{numbered(listed)}"
        )
        question = f"Question: What are the {COMMON_WORDS} most common words in the above list?"
        return context, question, f" Answer: The top {COMMON_WORDS} words that appear most often in the list are:"


@dataclass(frozen=True)
class FrequentWords(Recipe):
    """The three coded words of a text that stand in it most often, by Zipf's law; the most frequent of all is noise."""

    def record(self, texts: Texts, size: int, length: int, seed: Sequence[int]) -> RulerRecord:
        """See `Recipe.record`; ``size`` is how many words there are."""
        rng, letters = np.random.default_rng([*seed, 0]), np.array(list("abcdefghijklmnopqrstuvwxyz"))
        coded = map("".join, rng.choice(letters, (max(4, length // TOKENS_PER_CODED_WORD), CODED_LETTERS)))
        vocabulary = ["...", *dict.fromkeys(coded)]
        weights = np.arange(1, len(vocabulary) + 1) ** -ZETA
        counts = (size * weights / ZETA_SUM).astype(int)
        counts[1:4] = np.maximum(counts[1:4], [4, 3, 2])  # there, and apart from the fourth, however short the text is
        words = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        text = " ".join(np.random.default_rng([*seed, 2]).permutation(words).tolist())
        context = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {text}"
        )
        question = (
            "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?"
        )
        prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
        return self._record(context, question, prefix, vocabulary[1:4])


@dataclass(frozen=True)
class Questions(Recipe):
    """A question about one of many documents, or one that takes two of them.

    Attributes:
        hops: Documents that the answer takes.
    """

    hops: int = 1

    def record(self, texts: Texts, size: int, length: int, seed: Sequence[int]) -> RulerRecord:
        """See `Recipe.record`; ``size`` is how many other documents there are."""
        rng, around = np.random.default_rng([*seed, 0]), np.random.default_rng([*seed, 1])
        facts, question, answer = _one_hop(rng) if self.hops == 1 else _two_hops(rng)
        held = [" ".join([*texts.essay(2, around), fact, *texts.essay(1, around)]) for fact in facts]
        others = [" ".join(texts.essay(3, around)) for _ in range(size)]
        documents = _hidden(others, held, np.random.default_rng([*seed, 2]))
        text = "\n\n".join(f"Document {number}:\n{document}" for number, document in enumerate(documents, 1))
        only = "Only give me the answer and do not output any other words."
        task = f"Answer the question based on the given documents. {only}"
        context = f"{task}\n\nThe following are given documents.\n\n{text}\n"
        asked = f"{task}\n\nQuestion: {question}"
        return self._record(context, asked, " Answer:", [answer])


def _one_hop(rng: np.random.Generator) -> tuple[list[str], str, str]:
    fact = FACTS[int(rng.integers(len(FACTS)))]
    subject, value = str(rng.choice(fact.subjects)), str(rng.choice(fact.values))
    return [fact.statement.format(s=subject, v=value)], fact.question.format(s=subject), value


def _two_hops(rng: np.random.Generator) -> tuple[list[str], str, str]:
    """The owner of a thing, and where the owner lives."""
    lives, owner = FACTS[0], FACTS[-1]
    thing, name, city = (str(rng.choice(choices)) for choices in (owner.subjects, lives.subjects, lives.values))
    facts = [owner.statement.format(s=thing, v=name), lives.statement.format(s=name, v=city)]
    return facts, f"Where does the owner of the old {thing} live?", city


def _hidden(
    hay: Sequence[str], needles: Sequence[str], rng: np.random.Generator, *, in_order: bool = False
) -> list[str]:
    """The hay with needles at random places of it, by default in random order."""
    depths = rng.random(len(needles))
    order = np.sort(depths) if in_order else depths
    placed = [(round(float(depth) * len(hay)), number) for number, depth in enumerate(order)]
    found = list(hay)
    for at, number in sorted(placed, reverse=True):
        found.insert(at, needles[number])
    return found


def _uuid(rng: np.random.Generator) -> str:
    return str(UUID(bytes=rng.bytes(16), version=4))


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Needles("niah_single_1", 128, haystack="noise"),
        Needles("niah_single_2", 128),
        Needles("niah_single_3", 128, value_kind="uuids"),
        Needles("niah_multikey_1", 128, keys=4),
        Needles("niah_multikey_2", 128, haystack="needle"),
        Needles("niah_multikey_3", 128, haystack="needle", key_kind="uuids", value_kind="uuids"),
        Needles("niah_multivalue", 128, values=4),
        Needles("niah_multiquery", 128, keys=4, queries=4),
        Tracking("vt", 30),
        CommonWords("cwe", 120),
        FrequentWords("fwe", 50),
        Questions("qa_1", 32),
        Questions("qa_2", 32, hops=2),
    )
}
"""By RULER's names."""


def fitted(
    recipe: Recipe, texts: Texts, length: int, seed: Sequence[int], tokens: Callable[[RulerRecord], int]
) -> RulerRecord | None:
    """The largest record of a recipe that has at most ``length`` tokens; None where none has.

    Args:
        recipe: One of `RECIPES`.
        texts: See `Texts`.
        length: Tokens.
        seed: For everything drawn.
        tokens: Counts those of a record, the room for its answer among them.
    """

    def made(size: int) -> RulerRecord | None:
        record = recipe.record(texts, size, length, seed)
        return record if tokens(record) <= length else None

    best, size = made(1), 1
    if best is None:
        return None
    while (larger := made(2 * size)) is not None and size < length:
        best, size = larger, 2 * size
    step = size // 2
    while step:
        larger = made(size + step)
        if larger is not None:
            best, size = larger, size + step
        step //= 2
    return best
