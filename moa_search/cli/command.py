"""A command made from an API function: its keyword arguments are the flags and the YAML keys.

jsonargparse parses and types them; precedence is flag over ``--config file.yaml`` over default.
"""

from __future__ import annotations

import builtins
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from moa_search.errors import ConfigError, MoAError
from moa_search.formats.files import nearest
from moa_search.progress import no_bars
from moa_search.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["EXIT_BAD_INPUT", "build_parser", "open_console", "parse", "run"]

LOADING_OPTIONS = ("model", "random_weights", "validate")
"""Options that make a command load a model."""

MODEL_LIBRARIES = ("torch", "transformers", "datasets")
"""What running a model takes; searching and inspecting go without."""

NAMES_OF_TYPES = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text"}
WIDTH_WITHOUT_TERMINAL = 140
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def build_parser(
    program: str, function: Callable[..., Any], *, first: str, also: Mapping[str, str] | None = None
) -> ArgumentParser:
    """The parser for ``function``.

    Args:
        program: Name of the command.
        function: API function; its Google-style ``Args`` become the help texts.
        first: Name of its first parameter, or "config".
        also: Commands of their own that begin with this one's name, with what they do.
    """
    helps = _argument_helps(function)
    about = (inspect.getdoc(function) or "").split("\n")[0]
    if also:
        about += " Other commands: " + "; ".join(f"{program} {name} {does}" for name, does in also.items()) + "."
    parser = ArgumentParser(prog=program, description=about, exit_on_error=False)
    placed = "; also as the first argument, without the flag"
    parser.add_argument(
        "--config", action="config", help="YAML file with any of these options" + placed * (first == "config")
    )
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        options: dict[str, Any] = {
            "help": helps[name].replace("%", "%%"),
            **_typed(_annotation(function, parameter)),
        }
        if default is inspect.Parameter.empty:
            options["help"] += " (required)"
        else:
            options["default"] = list(default) if isinstance(default, tuple) else default
        if name == first and name != "model":
            options["help"] += placed
        if options.get("type") is bool:
            flag = name.replace("_", "-")
            parser.add_argument(
                f"--{flag}", dest=name, type=bool, default=default, help=options["help"], metavar="true|false"
            )
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", **options)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str] | None = None, *, first: str) -> Namespace:
    """Parsed options; a first argument without a flag is the one named ``first``.

    Raises:
        ConfigError: A flag, a YAML key or a value is wrong; one line says which.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and not given[0].startswith("-"):
        given.insert(0, f"--{first}")
    try:
        return parser.parse_args(given)
    except ArgumentError as error:
        message = _one_line(str(error), parser)
    if "--config" in given[:-1] and message.startswith("Problems parsing config"):
        message = f"{given[given.index('--config') + 1]}: {message}"
    raise ConfigError(message)


def run(
    program: str,
    function: Callable[..., Any],
    show: Callable[..., None],
    *,
    first: str,
    required: Sequence[str] = (),
    interrupted: str = "nothing was written",
    arguments: Sequence[str] | None = None,
    also: Mapping[str, str] | None = None,
) -> NoReturn:
    """Run a command to its exit status: 0, 2 for bad input (one line), 130 when interrupted.

    Of the processes that torchrun starts, only the first prints.

    Args:
        program: Name of the command.
        function: API function.
        show: Prints its result, given the result and the options.
        first: Name of the function's first parameter; "config" for the configuration file.
        required: Options that must be given.
        interrupted: What to say when the user stops it.
        arguments: Command line; ``sys.argv`` if None.
        also: As for `build_parser`.
    """
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    prints = os.environ.get("RANK", "0") == "0"
    try:
        options = vars(parse(build_parser(program, function, first=first, also=also), arguments, first=first))
        for name in ("config", "debug"):
            options.pop(name, None)
        quiet = options.pop("quiet") or not prints
        parameter = inspect.signature(function).parameters.get(first)  # none is called "config"
        needed = parameter is not None and parameter.default is inspect.Parameter.empty
        for name in (*((first,) if needed else ()), *required):
            if not options.get(name):
                given = name if name == first and name != "model" else f"--{name.replace('_', '-')}"
                raise ConfigError(f"{given} is required; see {program} --help")
        if any(options.get(name) for name in LOADING_OPTIONS):  # a search alone needs no transformers
            _quiet_transformers()
        with no_bars() if quiet else nullcontext():
            result = function(**options)
        if prints:
            show(result, **options)
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
            print(f"\n{program}: interrupted, {interrupted}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def open_console() -> Console:
    """Where results are printed: as wide as the terminal, and wide enough for every table where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)


def _quiet_transformers() -> None:
    """Its warnings and its bars for weights and shards, which it draws outside of terminals, too."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _typed(hint: Any) -> dict[str, Any]:
    """``type`` and ``nargs`` for a type hint; unions with Python-only types keep the part a flag can carry."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Sequence or origin is list:
        return {"type": _typed(arguments[0])["type"], "nargs": "+"}
    if origin is typing.Union or type(hint).__name__ == "UnionType":
        plain = [a for a in arguments if a is not type(None)]
        if str in plain:
            return {"type": str}
        return _typed(plain[0])
    return {"type": hint}


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """A parameter's type; names imported for type checking only (Plan, Profile) can't come from a flag."""

    class Names(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            return getattr(builtins, name, object)

    return eval(parameter.annotation, {}, Names(function.__globals__))


def _argument_helps(function: Callable[..., Any]) -> dict[str, str]:
    """The ``Args`` section of a Google-style docstring."""
    section = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _one_line(message: str, parser: ArgumentParser) -> str:
    known = [action.dest for action in parser._actions]
    message = " ".join(message.split())
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown:
        return f"unknown key {unknown[1]!r} in the configuration file{nearest(unknown[1], known)}"
    unknown = re.search(r"[Uu]nrecognized arguments: --([\w-]+)", message)
    if unknown:
        flag = nearest(unknown[1].replace("-", "_"), known).replace("_", "-")
        return f"unknown option --{unknown[1]}{flag}"
    choice = re.search(r'Parser key "(\w+)".*Literal\[(.*?)\]\. Got value: (.*)', message)
    if choice:
        allowed = re.findall(r"'([^']+)'", choice[2])
        return f"{choice[1]}: {choice[3]!r} is unknown{nearest(choice[3], allowed)}; choose from {', '.join(allowed)}"
    if message.endswith("object is not iterable"):  # jsonargparse names no key here
        several = ", ".join(action.dest for action in parser._actions if action.nargs == "+")
        return f"an option that takes several values isn't a list; write [...] for each of {several}"
    wrong = re.search(r'Parser key "(\w+)".*Expected an? <class \'(\w+)\'>\. Got value: (.*)', message)
    if wrong:
        return f"{wrong[1]}: {wrong[3]!r} is no {NAMES_OF_TYPES.get(wrong[2], wrong[2])}"
    missing = re.search(r"--config.*?(?:Unable to load|does not exist|No such file|not accessible)", message)
    return f"the configuration file can't be read: {message}" if missing else message
