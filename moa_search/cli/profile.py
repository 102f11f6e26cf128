"""``moa-profile``: measure what shortening each attention head's view would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from moa_search.api import profile_model
from moa_search.cli.command import run

__all__ = ["main", "show"]

if TYPE_CHECKING:
    from moa_search.formats import Profile


def show(profile: Profile, *, output: str, **options: Any) -> None:
    """Print what was measured and where it is."""
    for length, entry in profile.by_length.items():
        count, loss = entry.header.samples, entry.loss
        print(f"{length:>8} tokens  {count} samples  dense loss {loss.mean():.3f} nats per answer token")
    print(f"profile written to {output}")
    print(f"next: moa-search {output} --density 0.25 --output plans")


def main() -> NoReturn:
    """Entry point."""
    run("moa-profile", profile_model, show, first="model", task="profiling", required=("output",))
