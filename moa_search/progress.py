"""Progress bars, at the loops that take long: tqdm's, in a terminal and in notebooks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["no_bars", "progress"]

DISABLED = "TQDM_DISABLE"
"""Environment variable, tqdm's own, that hides all bars; processes that are started inherit it."""

SHOWN_AFTER_S = 0.5


def progress(
    loop: Iterable[Any] | None = None, *, what: str, unit: str, total: int | None = None, show: bool = True
) -> Any:
    """A tqdm bar; silent where standard error is neither a terminal nor a notebook, and under ``TQDM_DISABLE=1``.

    Args:
        loop: What is iterated over; without it, ``update`` tells the bar what was done.
        what: Is done.
        unit: Of the numbers, such as ``sample``.
        total: How many there are, if the loop doesn't say.
        show: False in processes that share the work but not the screen.
    """
    from tqdm.auto import tqdm

    wanted = show and os.environ.get(DISABLED, "0") in ("", "0")
    in_notebook = "ipykernel" in sys.modules  # where it is no terminal
    silent = (False if in_notebook else None) if wanted else True
    return tqdm(
        loop,
        desc=what,
        unit=f" {unit}",
        unit_scale=unit == "token",
        total=total,
        leave=None,  # bars within another go when they are done
        delay=SHOWN_AFTER_S,
        dynamic_ncols=True,
        disable=silent,
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """Show no bars for the duration of a ``with`` block."""
    before = os.environ.get(DISABLED)
    os.environ[DISABLED] = "1"
    try:
        yield
    finally:
        del os.environ[DISABLED]
        if before is not None:
            os.environ[DISABLED] = before
