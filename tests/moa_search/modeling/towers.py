"""Tiny models that see or hear, each with an input that its tower reads."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)

LENGTH, START, PLACE = 48, 95, 96
TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 8}


def _ids(places, started=False):
    ids = torch.randint(1, START, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, 4 : 4 + places] = PLACE
    if started:
        ids[:, 3] = START
    return ids


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=16),
        text_config=LlamaConfig(**TEXT),
        image_token_id=PLACE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), {"input_ids": _ids(4), "pixel_values": torch.randn(1, 3, 16, 16)}


def qwen2_vl():
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4, "mlp_ratio": 1}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=PLACE,
        vision_start_token_id=START,
    )
    ids = _ids(4, started=True)
    image = {"pixel_values": torch.randn(16, 48), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return Qwen2VLForConditionalGeneration(config), {
        "input_ids": ids,
        **image,
        "mm_token_type_ids": (ids == PLACE).int(),
    }


def gemma3():
    text = {**TEXT, "sliding_window": 24, "query_pre_attn_scalar": 8}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_id=PLACE)
    # Its decoder attends images in both directions, which spans can't express: text alone.
    return Gemma3ForConditionalGeneration(config), {"input_ids": _ids(0)}


def qwen2_audio():
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = Qwen2AudioConfig(
        audio_config={**AUDIO, **sizes}, text_config={"model_type": "qwen2", **TEXT}, audio_token_index=PLACE
    )
    return Qwen2AudioForConditionalGeneration(config), {
        "input_ids": _ids(4),
        "input_features": torch.randn(1, 8, 16),
        "feature_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "attention_mask": torch.ones(1, LENGTH, dtype=torch.long),
    }


def voxtral():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = VoxtralConfig(
        audio_config={**AUDIO, **sizes}, text_config={"model_type": "llama", **TEXT}, audio_token_id=PLACE
    )
    return VoxtralForConditionalGeneration(config), {"input_ids": _ids(4), "input_features": torch.randn(1, 8, 16)}


BUILDERS = {
    "llava": (llava, "vision_config"),
    "qwen2_vl": (qwen2_vl, "vision_config"),
    "gemma3": (gemma3, "vision_config"),
    "qwen2_audio": (qwen2_audio, "audio_config"),
    "voxtral": (voxtral, "audio_config"),
}
"""By name: what builds ``(model, input)``, and where the tower's configuration is."""
