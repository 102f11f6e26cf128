"""Which versions of vLLM this was tested with."""

from __future__ import annotations

from moa_search.errors import BackendUnavailableError

MINORS = ("0.32",)
"""Minor versions. What a plan needs of vLLM, its cache specs and managers, changes in most of them."""


def is_tested(version: str) -> bool:
    """Whether a version belongs to one of `MINORS`."""
    return ".".join(version.split("+")[0].split(".")[:2]) in MINORS


def require_tested(version: str) -> None:
    """Refuse to run a plan on another version.

    Raises:
        BackendUnavailableError: It isn't one of `MINORS`.
    """
    if not is_tested(version):
        raise BackendUnavailableError(
            f"vLLM {version}: plans were tested with vLLM {' and '.join(MINORS)}; install one of those, or "
            "serve without the plan"
        )
