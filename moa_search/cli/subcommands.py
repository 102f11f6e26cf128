"""Commands that begin with another's name, such as ``moa-search compare``."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import NoReturn

from moa_search.cli.command import EXIT_BAD_INPUT, Command, print_anything, run
from moa_search.formats.files import nearest


def run_any(program: str, main: Command, others: Mapping[str, Command], *, otherwise: str) -> NoReturn:
    """Run the command that ``sys.argv`` names, or else ``main``, to its exit status.

    A first word that is nearly a command's name, and no file's, ends in one line that says so.

    Args:
        program: Name of the main command.
        main: What runs where no other is named.
        others: By name.
        otherwise: What else the first argument can be, such as "a profile".
    """
    print_anything()
    words = sys.argv[1:]
    name = words[0] if words else ""
    if name in others:
        run(f"{program} {name}", others[name], words[1:])
    hint = "" if name.startswith("-") or "/" in name else nearest(name, others)
    if hint and not os.path.exists(name):
        print(f"{program}: error: {name!r} is neither {otherwise} nor a command{hint}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    run(program, main, words, others)
