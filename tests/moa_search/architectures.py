"""Tiny random models of many architectures, in double precision, with attention that prefers some keys."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.1,
}
SLIDING = {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
NO_GROUPS = {"num_key_value_heads": None, "head_dim": None}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen2 with sliding layers": {"use_sliding_window": True, "max_window_layers": 1, **SLIDING},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, **SLIDING},
    "gemma3_text": {"query_pre_attn_scalar": 8, **SLIDING},
    "phi3": {},
    "olmo2": {},
    "gpt_neox": NO_GROUPS,
    "mixtral": EXPERTS,
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16, "use_sliding_window": True, **SLIDING},
    "gpt_oss": {**EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **SLIDING},
    "granite": {"attention_multiplier": 0.5},
    "cohere2": SLIDING,
    "smollm3": {},
    "starcoder2": {},
    "phi": {},
    "stablelm": {},
}
"""What a configuration needs besides `SMALL`, by ``model_type`` and perhaps a remark; None leaves a setting out."""

NARROW_EXPERTS = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
MORE_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "biogpt": NO_GROUPS,
    "bitnet": {"head_dim": None},
    "cohere": {},
    "cwm": SLIDING,
    "ernie4_5": {},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "moe_k": 2},
    "exaone4": SLIDING,
    "gemma": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": NARROW_EXPERTS,
    "gpt2": NO_GROUPS,
    "gpt_bigcode": NO_GROUPS,
    "granitemoe": EXPERTS,
    "helium": {},
    "hunyuan_v1_dense": {},
    "minimax_m2": EXPERTS,
    "mistral with sliding layers": {"sliding_window": 40},
    "nemotron": {},
    "olmo": {"head_dim": None},
    "olmo3": SLIDING,
    "olmoe": {**EXPERTS, "head_dim": None},
    "opt": {**NO_GROUPS, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": NO_GROUPS,
    "phimoe": EXPERTS,
    "seed_oss": {},
    "vaultgemma": {"query_pre_attn_scalar": 8, **SLIDING},
}
"""Likewise; these only differ in what the runtime may stumble over."""

DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "head_dim": None}
HYBRIDS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "granitemoehybrid": {**EXPERTS, **MAMBA, "shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    "jamba": {
        **EXPERTS,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "head_dim": None,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "olmo_hybrid": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 40, "lru_width": 32},
}
"""Likewise; some of their layers, or parts of them, are linear attention, convolutions or recurrences."""


def make_model(architecture: str, **changes: Any) -> Any:
    """A random model in eval mode, whose weights want no gradient."""
    torch.manual_seed(0)
    known = {**ARCHITECTURES, **MORE_ARCHITECTURES, **HYBRIDS}
    fields = {**SMALL, **known.get(architecture, {}), **changes}
    config = AutoConfig.for_model(
        architecture.split()[0], **{name: value for name, value in fields.items() if value is not None}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    if hasattr(config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for parameter in model.parameters():  # attention that prefers some keys, and biases and sinks that matter
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model
