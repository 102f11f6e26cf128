"""Names, places and things, and what can be said and asked about them."""

from __future__ import annotations

from dataclasses import dataclass


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
