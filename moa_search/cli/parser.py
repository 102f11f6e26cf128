"""The flags of an API function's options, and their help in groups."""

from __future__ import annotations

import argparse
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest
from moa_search.options import Options
from moa_search.version import __version__

METAVARS = {int: "N", float: "X", bool: "true|false"}


class Parser(argparse.ArgumentParser):
    """Reads flags as text, whose meaning `moa_search.options` knows.

    Attributes:
        names: Of all options.
        required: Of those that must be given.
    """

    names: list[str]
    required: list[str]

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The options that are given, by name.

        Raises:
            ConfigError: A flag is unknown or lacks its value.
        """
        found, rest = self.parse_known_args(arguments)
        if rest:
            flag = rest[0].partition("=")[0]
            if not flag.startswith("--"):
                raise ConfigError(f"{rest[0]!r} belongs to no option; see {self.prog} --help")
            raise ConfigError(
                f"unknown option {flag}{nearest(flag, [f'--{name}' for name in map(_dashed, self.names)])}"
            )
        return vars(found)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print beside the usage."""
        raise ConfigError(message)


def first_of(function: Callable[..., Any]) -> inspect.Parameter:
    """The first parameter of an API function, which isn't among its options."""
    return next(iter(inspect.signature(inspect.unwrap(function)).parameters.values()))


def build_parser(
    program: str,
    function: Callable[..., Any],
    examples: Sequence[str],
    others: Mapping[str, str],
    *,
    first: str | None,
    required: Sequence[str],
) -> Parser:
    """The parser for an API function.

    Args:
        program: Name of the command.
        function: Made by `moa_search.options.takes`.
        examples: Command lines.
        others: Other commands, with what they do.
        first: Option that the first word stands for; None for the function's first parameter.
        required: Options that must be given although the function does without.
    """
    parameter, options = first_of(function), function.options  # type: ignore[attr-defined]
    first = first or parameter.name
    parser = Parser(
        prog=program,
        description=(inspect.getdoc(function) or "").split("\n")[0],
        epilog=_epilog(examples, others),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    fields = options.model_fields
    parser.names = [parameter.name, *fields]
    needed = [] if "None" in str(parameter.annotation) else [parameter.name]
    needed += [name for name, field in fields.items() if field.is_required()]
    parser.required = list(dict.fromkeys([*needed, *required]))
    parser.usage = " ".join(
        [
            program,
            first.upper(),
            *(f"--{_dashed(name)} {name.upper()}" for name in parser.required if name != first),
            "[options]",
        ]
    )
    main = parser.add_argument_group("input" if parameter.name != "output" else "output")
    _add(main, parameter.name, _documented(function, parameter.name), _kind_of(parameter))
    headings = {home: (home.__doc__ or "").split("\n")[0].rstrip(".").lower() for home in options.__mro__}
    home_of = {name: _home(options, name) for name in fields}
    for heading in dict.fromkeys(headings[home] for home in options.__mro__ if home in home_of.values()):
        group = parser.add_argument_group(heading)
        for name, field in fields.items():
            if headings[home_of[name]] == heading:
                default = None if field.is_required() else field.get_default(call_default_factory=True)
                _add(group, name, field.description or "", _kind(field.annotation), default)
    general = parser.add_argument_group("general")
    general.add_argument("--config", metavar="FILE", help="YAML file with any of these options; flags win")
    general.add_argument("--quiet", action="store_true", help="no progress bars")
    general.add_argument("--debug", action="store_true", help="show the traceback of an error")
    general.add_argument("--version", action="version", version=f"{program} {__version__}")
    general.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def _add(group: argparse._ArgumentGroup, name: str, text: str, kind: tuple[bool, Any], default: Any = None) -> None:
    several, base = kind
    choices = typing.get_args(base) if typing.get_origin(base) is Literal else ()
    if several and choices:
        text += f" Choices: {', '.join(choices)}."
    if default not in (None, (), {}, ""):
        values = default if isinstance(default, (tuple, list)) else [default]
        text += (
            f" (default: {' '.join(str(value).lower() if isinstance(value, bool) else f'{value}' for value in values)})"
        )
    metavar = "{" + ",".join(choices) + "}" if choices and not several else METAVARS.get(base, name.upper())
    options: dict[str, Any] = {"dest": name, "metavar": metavar, "help": text.replace("%", "%%")}
    if several:
        options["nargs"] = "+"
    elif base is bool:
        options |= {"nargs": "?", "const": "true"}  # --flag alone means true
    group.add_argument(f"--{_dashed(name)}", **options)


def _kind(annotation: Any) -> tuple[bool, Any]:
    """Whether an option takes several values, and the type of each."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _kind(next(argument for argument in arguments if argument is not type(None)))
    if origin is dict:
        return True, str
    return (True, _kind(arguments[0])[1]) if origin is Sequence else (False, annotation)


def _kind_of(parameter: inspect.Parameter) -> tuple[bool, Any]:
    return str(parameter.annotation).startswith("Sequence"), str


def _home(options: type[Options], name: str) -> type:
    """The class whose group an option belongs to: the most general that has it."""
    return [kind for kind in options.__mro__ if name in getattr(kind, "__annotations__", ())][-1]


def _documented(function: Callable[..., Any], name: str) -> str:
    """An entry of the ``Args`` section of a Google-style docstring."""
    entry = re.search(rf"^ {{4}}{name}: (.*(?:\n {{8}}.*)*)", inspect.getdoc(function) or "", flags=re.MULTILINE)
    assert entry is not None, name
    return " ".join(entry[1].split())


def _epilog(examples: Sequence[str], others: Mapping[str, str]) -> str:
    parts = []
    if examples:
        parts.append("\n".join(["examples:", *(f"  {example}" for example in examples)]))
    if others:
        width = max(map(len, others))
        parts.append("\n".join(["other commands:", *(f"  {name:{width}}  {does}" for name, does in others.items())]))
    return "\n\n".join(parts)


def _dashed(name: str) -> str:
    return name.replace("_", "-")
