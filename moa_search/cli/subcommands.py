"""Commands that begin with another's name, such as ``moa-search compare``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa_search.cli.command import EXIT_BAD_INPUT, run
from moa_search.formats.files import nearest

__all__ = ["Subcommand", "descriptions", "run_subcommand"]


@dataclass(frozen=True)
class Subcommand:
    """A command of its own under another's name; the attributes are those of `moa_search.cli.command.run`.

    Attributes:
        does: What it does, for the help of the command whose name it begins with.
        function: API function.
        show: Prints its result.
        first: Name of the function's first parameter.
        required: Options that must be given.
        interrupted: What to say when the user stops it.
    """

    does: str
    function: Callable[..., Any]
    show: Callable[..., None]
    first: str
    required: Sequence[str] = ()
    interrupted: str = "nothing was written"


def run_subcommand(program: str, subcommands: Mapping[str, Subcommand], *, otherwise: str) -> None:
    """Run the subcommand that ``sys.argv`` names, to its exit status; return if it names none.

    A first word that is nearly a subcommand's name, and no file's, ends in one line that says so.

    Args:
        program: Name of the command.
        subcommands: By name.
        otherwise: What else its first argument can be, such as "a profile".
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in subcommands:
        found = subcommands[name]
        run(
            f"{program} {name}",
            found.function,
            found.show,
            first=found.first,
            required=found.required,
            interrupted=found.interrupted,
            arguments=sys.argv[2:],
        )
    hint = "" if name.startswith("-") else nearest(name, subcommands)
    if hint and not os.path.exists(name):
        print(f"{program}: error: {name!r} is neither {otherwise} nor a command{hint}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


def descriptions(subcommands: Mapping[str, Subcommand]) -> dict[str, str]:
    """What each does, as `moa_search.cli.command.run` wants it for the help."""
    return {name: command.does for name, command in subcommands.items()}
