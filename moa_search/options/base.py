"""What options have in common: values are read once, errors are one line, and functions take options as keywords."""

from __future__ import annotations

import functools
import inspect
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Concatenate, ParamSpec, Self, TypeVar, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from moa_search.errors import ConfigError
from moa_search.formats.files import nearest, one_line
from moa_search.spans import MAX_LENGTH

P = ParamSpec("P")
First = TypeVar("First")
Made = TypeVar("Made", bound="Options")
Result = TypeVar("Result")
T = TypeVar("T")


def as_list(value: Any) -> Any:
    """A list of one where a single value is given, an empty one for None."""
    if value is None:
        return []
    if isinstance(value, (str, bytes, BaseModel, Mapping)) or not isinstance(value, Iterable):
        return [value]
    return value if isinstance(value, (list, tuple)) else list(value)


Several = Annotated[Sequence[T], BeforeValidator(as_list)]
"""Any number of values; a single one stands for a list of one."""

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Tokens = Annotated[int, Field(gt=0, le=MAX_LENGTH)]
ListOrNone = BeforeValidator(lambda value: None if value is None else as_list(value))
Lengths = Annotated[Annotated[Sequence[Tokens], Field(min_length=1)] | None, ListOrNone]
"""Context lengths in tokens; None for those that the description says."""


class Options(BaseModel):
    """Options of a function: every field is a keyword, a flag and a YAML key.

    A subclass's docstring is the heading of its fields in ``--help``, a field's docstring its description.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def __init__(self, **values: Any) -> None:
        """Read values.

        Raises:
            ConfigError: One is unknown, missing or can't be used; one line says which and why.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_describe(error, type(self))) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: plain(value) for name, value in values.items()}

    def replace(self, **changes: Any) -> Self:
        """The same with other values, read anew."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)

    def part(self, kind: type[Made]) -> Made:
        """The options of a group that these include."""
        return kind(**{name: getattr(self, name) for name in self.model_fields_set.intersection(kind.model_fields)})


def plain(value: Any) -> Any:
    """Paths as text and NumPy's numbers and arrays as Python's, within lists too."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy":
        return value.tolist()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def takes(
    kind: Callable[P, Made], *, may_lack_first: bool = False
) -> Callable[[Callable[[First, Made], Result]], Callable[Concatenate[First, P], Result]]:
    """Let a function of something and of its options take these as keywords.

    ``__wrapped__`` is the function that takes an object, and ``options`` the class.

    Args:
        kind: Class of the options.
        may_lack_first: Whether options alone are enough; the function is then given None.
    """
    options = cast(type[Options], kind)

    def decorate(function: Callable[[First, Made], Result]) -> Callable[Concatenate[First, P], Result]:
        first = next(iter(inspect.signature(function).parameters.values()))
        if may_lack_first:
            first = first.replace(default=None)

        @functools.wraps(function)
        def call(*given: Any, **changes: Any) -> Result:
            if len(given) > 1:
                raise TypeError(f"{function.__name__}() takes one argument without a name: {first.name}")
            if not given:
                if first.name not in changes and first.default is inspect.Parameter.empty:
                    raise TypeError(f"{function.__name__}() lacks its argument {first.name}")
                given = (changes.pop(first.name, first.default),)
            return function(read_first(first, given[0]), cast(Made, options(**changes)))

        call.options = options  # type: ignore[attr-defined]
        call.__signature__ = inspect.Signature([first, *_parameters(options)])  # type: ignore[attr-defined]
        call.__doc__ = _documented(function.__doc__ or "", options)
        return call

    return decorate


def read_first(parameter: inspect.Parameter, value: Any) -> Any:
    """The value of a function's first parameter, a list where its type says so."""
    value = plain(value)
    return as_list(value) if str(parameter.annotation).startswith("Sequence") else value


def _parameters(options: type[Options]) -> list[inspect.Parameter]:
    empty = inspect.Parameter.empty
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=empty if field.is_required() else field.get_default(call_default_factory=True),
            annotation=_plainly(field.annotation),
        )
        for name, field in options.model_fields.items()
    ]


def _plainly(annotation: Any) -> Any:
    """A type without what pydantic checks besides."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _plainly(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(_plainly, arguments))
    return origin[tuple(map(_plainly, arguments))] if origin in (Sequence, dict) else annotation


def _documented(text: str, options: type[Options]) -> str:
    """A docstring in which every option has the place of the entry ``options``."""
    lines = "".join(f"        {name}: {field.description}\n" for name, field in options.model_fields.items())
    return re.sub(r"        options: .*\n(?: {12}.*\n)*", lambda _: lines, text)


def _describe(error: ValidationError, options: type[Options]) -> str:
    """The first problem, on one line."""
    first = error.errors(include_url=False)[0]
    name, value, limits = str(first["loc"][0]) if first["loc"] else "options", first["input"], first.get("ctx", {})
    shown = f"{value:g}" if isinstance(value, float) else one_line(value)
    kind = first["type"]
    if kind == "missing":
        return f"{name} is required"
    if kind == "extra_forbidden":
        return f"unknown option {one_line(name)!r}{nearest(name, options.model_fields)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", str(limits["expected"]))
        return f"{name}: {shown!r} is unknown{nearest(str(value), choices)}; choose from {', '.join(choices)}"
    if kind == "value_error":
        message = str(limits["error"])
        return message if message.startswith(name) else f"{name}: {message}"
    if kind == "too_short":
        return f"{name}: give at least {limits['min_length']}"
    if kind == "finite_number":
        return f"{name}: {shown} is out of range; it must be finite"
    if kind.startswith("bool"):
        return f"{name}: {shown!r} is neither true nor false"
    bounds = {"gt": "over {}", "ge": "at least {}", "lt": "under {}", "le": "at most {}"}
    for bound, words in bounds.items():
        if bound in limits:
            share = _as_share(value) if limits[bound] == 1 else None
            hint = "" if share is None else f"; {shown} % is {share:g}"
            return f"{name}: {shown} is out of range; it must be {words.format(f'{limits[bound]:.15g}')}{hint}"
    nouns = {"int": "whole number", "float": "number", "string": "text"}
    noun = nouns.get(kind.partition("_")[0])
    part = re.fullmatch(r"\s*(\d*\.?\d+)\s*%\s*", value) if isinstance(value, str) and noun == "number" else None
    if part:
        return f"{name}: {shown!r} is no number; write {float(part[1]) / 100:g}"
    if isinstance(value, str) and "," in value and noun in ("number", "whole number"):
        return f"{name}: {shown!r} is no {noun}; put spaces between several, such as {value.replace(',', ' ').strip()}"
    return f"{name}: {shown!r} is no {noun}" if noun else f"{name}: {shown!r} can't be used ({one_line(first['msg'])})"


def _as_share(value: Any) -> float | None:
    """The share that a number too large for one may mean in percent."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number / 100 if 1 < number <= 100 else None
