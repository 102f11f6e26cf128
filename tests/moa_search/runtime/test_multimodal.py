"""Models that see: the text decoder follows the plan, the vision tower is left alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from moa_search.errors import ModelUnsupportedError
from moa_search.runtime import MoACache, apply_plan
from tests.moa_search.modeling.towers import VISION

from .explicit import SIZES, explicit, tiny_model, tiny_plan, tokens

START, IMAGE = 95, 96


def llava():
    vision = CLIPVisionConfig(**VISION, projection_dim=16)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_id=IMAGE, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config), {"pixel_values": torch.randn(1, 3, 16, 16).double()}


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 2,
        "hidden_size": 48,
        "patch_size": 4,
        "mlp_ratio": 1,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
    }
    text = {**SIZES, "head_dim": 8, "rope_parameters": rope}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START)
    patches = {"pixel_values": torch.randn(16, 48).double(), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return Qwen2VLForConditionalGeneration(config), {**patches, "mm_token_type_ids": (prompt(True) == IMAGE).int()}


def gemma3():
    text = {**SIZES, "sliding_window": 24, "query_pre_attn_scalar": 16}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config), {}  # it attends images in both directions, which is refused


def prompt(with_image):
    ids = tokens(1, 80).clamp(max=START - 1)
    if with_image:
        ids[:, 6], ids[:, 7:11] = START, IMAGE
    return ids


@pytest.mark.parametrize("build", [llava, qwen2_vl, gemma3])
def test_generation_equals_that_under_explicit_masks(build):
    torch.manual_seed(0)
    model, image = build()
    model = model.double().eval()
    model.generation_config.eos_token_id = None
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    options = {"max_new_tokens": 25, "do_sample": False, "suppress_tokens": [START, IMAGE]}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    dense = model.generate(prompt(bool(image)), **image, **options)
    found = apply_plan(model, plan).generate(prompt(bool(image)), **image, **options)
    expected = reference.generate(prompt(bool(image)), use_cache=False, **image, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
    assert (dense.logits[0] - found.logits[0]).abs().max() > 1e-3
    assert type(found.past_key_values) is MoACache
    assert model.config.vision_config._attn_implementation != model.config.get_text_config()._attn_implementation


def test_a_decoder_that_attends_images_from_afar_is_refused():
    config = MllamaConfig(text_config={**SIZES, "cross_attention_layers": [1]})
    with pytest.raises(ModelUnsupportedError, match="images through cross attention"):
        MoACache(config, tiny_plan(tiny_model()))
