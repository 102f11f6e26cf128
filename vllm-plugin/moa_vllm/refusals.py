"""What a plan can't be served with, said in one line before any weights are loaded."""

from __future__ import annotations

from typing import Any

from moa_search.errors import BackendUnavailableError, ModelUnsupportedError, UnsupportedInputError
from moa_search.formats import ModelSignature, Plan
from moa_search.formats.paged import require_paged
from moa_vllm.lookup import GPU_VARIABLE, tries_gpu

CACHE_TYPES = ("auto", "float16", "bfloat16", "float32")


def require_servable(plan: Plan, source: str, config: Any) -> None:
    """Check a plan and a configuration of vLLM.

    Args:
        plan: The plan.
        source: Names it in errors.
        config: A ``VllmConfig``.

    Raises:
        ModelMismatchError: The plan was made for another model.
        ModelUnsupportedError: The model has attention that plans don't cover in vLLM.
        UnsupportedInputError: Something else that is asked for, or something in the plan, isn't served.
    """
    model = config.model_config
    plan.model.require(ModelSignature.of(model.hf_config), source)
    require_paged(plan, source)
    kinds = [kind for kind, found in _of_model(model).items() if found]
    if kinds:
        raise ModelUnsupportedError(f"{source}: vLLM can't serve models with {', '.join(kinds)} under a plan")
    asked = [name for name, found in _of_engine(config).items() if found]
    if asked:
        raise UnsupportedInputError(f"{source}: a plan can't be served with {', '.join(asked)}; leave it out")


def require_platform(platform: Any, config: Any) -> None:
    """Check where vLLM runs.

    Args:
        platform: vLLM's ``current_platform``.
        config: A ``VllmConfig``.

    Raises:
        BackendUnavailableError: Not on a CPU, nor on an NVIDIA GPU where `moa_vllm.lookup.tries_gpu` says to try:
            the kernels ran there, but never within vLLM.
    """
    if platform.is_cpu():
        return
    where = f"vLLM on {platform.device_name}"
    if not platform.is_cuda():
        raise BackendUnavailableError(f"{where} can't serve plans; moa-serve --engine transformers can")
    if not tries_gpu(config):
        raise BackendUnavailableError(
            f"{where} was never tested under a plan; {GPU_VARIABLE}=1 tries it; "
            "moa-serve --engine transformers is tested there"
        )


def _of_model(model: Any) -> dict[str, bool]:
    return {
        "multi-head latent attention": model.use_mla,
        "layers other than attention": model.is_hybrid or model.is_attention_free,
        "an encoder beside the decoder": model.is_encoder_decoder,
        "attention in both directions": model.is_mm_prefix_lm,
        "answers other than text": model.runner_type != "generate",
    }


def _of_engine(config: Any) -> dict[str, bool]:
    parallel, cache = config.parallel_config, config.cache_config
    chosen = config.attention_config.backend
    return {
        f"--tensor-parallel-size {parallel.tensor_parallel_size}": (
            config.model_config.get_total_num_kv_heads() % parallel.tensor_parallel_size != 0
        ),
        "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": (parallel.decode_context_parallel_size or 1) > 1,
        "--prefill-context-parallel-size": (parallel.prefill_context_parallel_size or 1) > 1,
        "--enable-dbo": parallel.use_ubatching,
        "--speculative-config": config.speculative_config is not None,
        "--kv-transfer-config": config.kv_transfer_config is not None,
        "--kv-offloading-size": cache.kv_offloading_size is not None,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in CACHE_TYPES,
        "--kv-sharing-fast-prefill": cache.kv_sharing_fast_prefill,
        "--disable-hybrid-kv-cache-manager": config.scheduler_config.disable_hybrid_kv_cache_manager is True,
        "--attention-backend": chosen is not None and chosen.name != "CUSTOM",
    }
