"""Beside MkDocs' configuration: a navigation of the pages that are there, and links that leave docs/ as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)]+)\)")


def on_config(config: Any) -> Any:
    """Drop pages that don't exist from the navigation, and append those that nobody listed."""
    there = {path.name for path in Path(config.docs_dir).glob("*.md")}
    listed: set[str] = set()
    config.nav = [kept for entry in config.nav if (kept := _existing(entry, there, listed)) is not None]
    more = sorted(there - listed)
    if more:
        config.nav.append({"More": more})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a file of the repository beside docs/ says where it is; the site doesn't hold it."""
    return OUTSIDE.sub(lambda match: f"{match[1]} (`{match[2]}` in the repository)", markdown)


def _existing(entry: Any, there: set[str], listed: set[str]) -> Any:
    """A navigation entry without the pages that aren't there; None if nothing is left."""
    if isinstance(entry, str):
        if entry not in there:
            return None
        listed.add(entry)
        return entry
    ((title, inside),) = entry.items()
    if isinstance(inside, str):
        return None if _existing(inside, there, listed) is None else entry
    kept = [one for part in inside if (one := _existing(part, there, listed)) is not None]
    return {title: kept} if kept else None
