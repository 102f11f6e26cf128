"""Progress bars, at the loops that take long: tqdm's, in a terminal and in notebooks."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

DISABLED = "TQDM_DISABLE"
"""Environment variable, tqdm's own, that hides all bars; processes that are started inherit it."""

SHOWN_AFTER_S = 0.5

_bars: WeakSet[Any] = WeakSet()


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in a notebook without ipywidgets, that there are none: text will do
        from tqdm.auto import tqdm

    silent = None  # tqdm finds out whether there is a terminal
    if _in_notebook():
        # Text bars can't stand below one another there.
        of_text = not any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
        silent = of_text and any(not bar.disable for bar in _bars)
    if not show or os.environ.get(DISABLED, "0") not in ("", "0"):
        silent = True
    bar = tqdm(
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
    _bars.add(bar)
    return bar


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


def _in_notebook() -> bool:
    """Whether this runs in a kernel of Jupyter, which has no terminal but shows what is written."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
