"""Templates that lie beside the code as files: HTML and SVG."""

from __future__ import annotations

from functools import cache
from typing import Any


def load_macros(package: str, file: str) -> Any:
    """The macros of a template: functions that give safe HTML and escape what they are given.

    Args:
        package: That the file belongs to.
        file: Its path within the package.
    """
    return _environment(package).get_template(file).module


def render(package: str, file: str, **context: Any) -> str:
    """A whole template; arguments as for `load_macros`."""
    return str(_environment(package).get_template(file).render(**context))


@cache
def _environment(package: str) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
