"""Everything that is told to vLLM, through its own registries.

* A hook per architecture on the configuration, where models adjust theirs, too: in the process that parses the command
  line, before an engine starts, a plan is looked up and refused or switched on.
* An attention backend, ``CUSTOM``; and in place of each other backend a choice (`moa_vllm.choose`), so that a planned
  model runs no other one: CPUs have one backend only, whatever is asked for.
* A KV cache spec, and the manager of its blocks.
"""

from __future__ import annotations

from typing import Any

from moa_search.errors import BackendUnavailableError
from moa_vllm.generation import read_settings_as_saved
from moa_vllm.lookup import declines_plan, find_plan, names_plan
from moa_vllm.refusals import require_platform, require_servable
from moa_vllm.versions import MINORS, is_tested, require_tested

BACKEND = "moa_vllm.backend.SpanBackend"

BLOCK_TOKENS = 16
"""Tokens per block, unless told otherwise: what a window begins in is held whole."""


def register_all() -> None:
    """Register the plug-in.

    Raises:
        BackendUnavailableError: This version of vLLM has no hook on the configuration.
    """
    import vllm

    try:
        _register_hooks()
    except (ImportError, AttributeError) as error:
        raise BackendUnavailableError(
            f"vLLM {vllm.__version__} isn't known to moa-vllm ({error}), which was made for {' and '.join(MINORS)}; "
            "install one of those, or uninstall moa-vllm"
        ) from error
    if is_tested(vllm.__version__):
        _register_backends()
        _register_cache()


def switch_on(config: Any) -> None:
    """Set a configuration up for the plan that it names, if any.

    Args:
        config: A ``VllmConfig``, changed in place.

    Raises:
        MoAError: The plan can't be read, or not be served so.
    """
    import vllm
    from vllm.platforms import current_platform

    if not names_plan(config):
        if declines_plan(config):
            read_settings_as_saved(config.model_config)
        return
    require_tested(vllm.__version__)
    require_platform(current_platform, config)
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    named = find_plan(config)
    assert named is not None
    require_servable(named.plan, named.source, config)
    read_settings_as_saved(config.model_config)
    config.attention_config.backend = AttentionBackendEnum.CUSTOM
    cache = config.cache_config
    if not cache.user_specified_block_size:
        cache.block_size, cache.user_specified_block_size = BLOCK_TOKENS, True


def _register_hooks() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    for architecture in ModelRegistry.get_supported_archs():
        own = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not getattr(own, "switches_plans_on", False):
            MODELS_CONFIG_MAP[architecture] = _hooked(own)


def _hooked(own: type) -> type:
    """A model's hook on the configuration, followed by ours."""

    def verify_and_update_config(vllm_config: Any) -> None:
        own.verify_and_update_config(vllm_config)  # type: ignore[attr-defined]
        switch_on(vllm_config)

    members = {"verify_and_update_config": staticmethod(verify_and_update_config), "switches_plans_on": True}
    return type(own.__name__, (own,), members)


def _register_backends() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    for backend in AttentionBackendEnum:
        if backend.value and "MLA" not in backend.name:
            register_backend(backend, f"moa_vllm.choose.{backend.name}")


def _register_cache() -> None:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from moa_vllm.cache import SpanManager, SpanSpec

    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # vLLM registers its own only while the table is empty
    KVCacheSpecRegistry.register(SpanSpec, SpanManager)
