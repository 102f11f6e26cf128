"""Commands made from API functions: their options are the flags and the YAML keys.

A flag beats a key in ``--config file.yaml`` beats the default. `moa_search.options` reads all of them.
"""

from __future__ import annotations

import inspect
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.cli.config import read_config
from moa_search.cli.parser import Parser, build_parser, first_of
from moa_search.errors import ConfigError, MoAError
from moa_search.options.base import read_first
from moa_search.progress import no_bars

if TYPE_CHECKING:
    from rich.console import Console

    from moa_search.options import Options

WIDTH_WITHOUT_TERMINAL = 140
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

LOADING_OPTIONS = ("model", "random_weights", "validate")
"""Options that make a command load a model."""

MODEL_LIBRARIES = ("torch", "transformers", "datasets")
"""What running a model takes; searching and inspecting go without."""


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        does: What it does, for the help of the command whose name it begins with.
        function: API function, made by `moa_search.options.takes`.
        show: Prints its result, given the result and the options.
        examples: Command lines for ``--help``.
        first: Option that the first word without a flag stands for; by default the function's first parameter.
        required: Options that must be given although the function does without.
        interrupted: What to say when the user stops it.
    """

    does: str
    function: Callable[..., Any]
    show: Callable[..., None]
    examples: Sequence[str] = ()
    first: str | None = None
    required: Sequence[str] = ()
    interrupted: str = "nothing was written"


def parser_of(program: str, command: Command, others: Mapping[str, Command] | None = None) -> Parser:
    """The parser of a command; ``others`` begin with its name."""
    about = {f"{program} {name}": other.does for name, other in (others or {}).items()}
    return build_parser(
        program, command.function, command.examples, about, first=command.first, required=command.required
    )


def parse(program: str, command: Command, arguments: Sequence[str]) -> tuple[Any, Options]:
    """The value of the function's first parameter, and the options.

    Raises:
        ConfigError: A flag, a YAML key or a value is wrong or missing; one line says which.
    """
    parser, parameter = parser_of(program, command), first_of(command.function)
    given = list(arguments)
    if given and not given[0].startswith("-"):
        given.insert(0, f"--{command.first or parameter.name}")
    flags = parser.read(given)
    file = flags.pop("config", None)
    values = flags if file is None else read_config(file, parser.names) | flags
    for name in parser.required:
        if not values.get(name):
            shown = name if name == (command.first or parameter.name) else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{shown} is required; see {program} --help")
    first = read_first(parameter, values.pop(parameter.name, None))
    return first, command.function.options(**values)  # type: ignore[attr-defined]


def run(
    program: str, command: Command, arguments: Sequence[str], others: Mapping[str, Command] | None = None
) -> NoReturn:
    """Run a command to its exit status: 0, 2 for bad input (one line), 130 when interrupted.

    Of the processes that torchrun starts, only the first prints.

    Args:
        program: Name of the command.
        command: What to run.
        arguments: Command line.
        others: Commands that begin with its name, for the help.
    """
    print_anything()
    debug = "--debug" in arguments
    prints = os.environ.get("RANK", "0") == "0"
    if {"-h", "--help"} & set(arguments):
        parser_of(program, command, others).print_help()
        sys.exit(0)
    try:
        words = [word for word in arguments if word not in ("--debug", "--quiet")]
        first, options = parse(program, command, words)
        named = {first_of(command.function).name: first, **dict(options)}
        if any(named.get(name) for name in LOADING_OPTIONS):  # a search alone needs no transformers
            _quiet_transformers()
        with no_bars() if "--quiet" in arguments or not prints else nullcontext():
            result = inspect.unwrap(command.function)(first, options)
        if prints:
            command.show(result, **named)
    except MoAError as error:
        if debug:
            raise
        if prints:
            print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except ModuleNotFoundError as error:
        if debug or error.name not in MODEL_LIBRARIES:
            raise
        if prints:
            print(f"{program}: error: this needs {error.name}; pip install {error.name}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        if prints:
            print(f"\n{program}: interrupted, {command.interrupted}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def print_anything() -> None:
    """Print ``?`` for characters that a stream's encoding lacks, rather than fail: Windows' pipes aren't UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def open_console() -> Console:
    """Where results are printed: as wide as the terminal, and wide enough for every table where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)


def _quiet_transformers() -> None:
    """Its warnings and its bars for weights and shards, which it draws outside of terminals, too."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
