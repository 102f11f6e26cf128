"""In place of vLLM's attention backends: ``moa_vllm.choose.FLASH_ATTN`` is ours where a plan is named, else vLLM's.

vLLM imports a backend by its path while the model is built, with the configuration at hand.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum.__members__.get(name)
    if backend is None or not backend.value:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = get_current_vllm_config_or_none()
    if config is not None:
        from moa_vllm.lookup import names_plan

        if names_plan(config):
            from moa_vllm.backend import SpanBackend

            return SpanBackend
    return resolve_obj_by_qualname(backend.value)
