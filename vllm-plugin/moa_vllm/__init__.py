"""Plans of moa-search in vLLM: each KV head attends by its span rule, and the memory that a plan drops is free.

vLLM finds `register` through the entry point ``vllm.general_plugins`` and calls it in every process. Without a plan
nothing changes.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make the plug-in known to vLLM; may be called more than once.

    Raises:
        BackendUnavailableError: This version of vLLM can't even be told to refuse a plan.
    """
    from moa_vllm.registration import register_all

    register_all()
