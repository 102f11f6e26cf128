"""Questions in natural language about a fact that stands far before them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moa_search.calibration.prompts import Asking, Generator, Item

__all__ = ["FACTS", "NAMES", "Fact", "QuestionGenerator"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("""
Alice Anna Ben Carla Carlos Clara Daniel David Elena Emma Eva Felix Frank George Hannah Helen Ivan Jack James Julia
Karl Laura Leo Linda Lucas Maria Mark Martin Mary Max Nina Oscar Paul Peter Robert Rosa Sam Sarah Simon Sofia Thomas
Victor
""")
CITIES = _words("""
Amsterdam Athens Barcelona Berlin Boston Brussels Budapest Cairo Chicago Copenhagen Dublin Geneva Hamburg Helsinki
Istanbul Lima Lisbon London Madrid Miami Milan Moscow Munich Naples Oslo Paris Prague Rome Seattle Seoul Stockholm
Sydney Tokyo Toronto Vienna Warsaw Zurich
""")
MONTHS = _words("January February March April May June July August September October November December")
JOBS = _words("""
baker barber butcher carpenter chemist cook dancer dentist doctor farmer fisherman gardener judge lawyer librarian
mechanic nurse painter pilot plumber poet sailor singer soldier tailor teacher
""")
ANIMALS = _words("""
bear camel cat cow dog donkey duck elephant fox frog goat horse lion monkey owl parrot pig rabbit sheep
""")
THINGS = _words("bicycle boat bridge castle church clock garden hotel house lamp library museum piano school tower")


@dataclass(frozen=True)
class Fact:
    """A kind of fact.

    Attributes:
        statement: With places for a subject ``s`` and, last, a value ``v``.
        question: What asks for the value.
        subjects: What it is about.
        values: What is asked for.
    """

    statement: str
    question: str
    subjects: tuple[str, ...]
    values: tuple[str, ...]


FACTS = (
    Fact("{s} lives in the city of {v}.", "Where does {s} live?", NAMES, CITIES),
    Fact("{s} was born in the city of {v}.", "Where was {s} born?", NAMES, CITIES),
    Fact("{s} was born in the month of {v}.", "When was {s} born?", NAMES, MONTHS),
    Fact("{s} works as a {v}.", "What is the job of {s}?", NAMES, JOBS),
    Fact("The favorite animal of {s} is the {v}.", "What is the favorite animal of {s}?", NAMES, ANIMALS),
    Fact("The owner of the old {s} is {v}.", "Who is the owner of the old {s}?", THINGS, NAMES),
)


class QuestionGenerator(Generator):
    """A fact told in the first half of a long document and asked for at its end: where, when, what, who.

    Answered freely in a chat; plain text begins the answer, so that a base model goes on with it.
    """

    name = "question"

    def draw(self, length: int, depth: float, rng: np.random.Generator) -> Item:
        """See `Generator.draw`; ``depth`` is halved, so that the fact is far from its question."""
        fact = FACTS[int(rng.integers(len(FACTS)))]
        subject, value = str(rng.choice(fact.subjects)), str(rng.choice(fact.values))
        statement = fact.statement.format(s=subject, v=value)
        asking = Asking(
            question=f"\n\nQuestion: {fact.question.format(s=subject)}",
            lead=f"\nAnswer: {statement.removesuffix(f' {value}.')}",
            answers=(f" {value}",),
            free=self._frame.is_chat,
        )
        return self._hide([(depth / 2, f"\n\n{statement}\n\n")], asking, length, rng)
