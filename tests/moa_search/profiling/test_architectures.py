"""Every supported architecture: the profile against derivatives of a plain forward pass.

Mixing a head's output with the one under a window, ``o + epsilon * (o(S) - o)``, changes the loss at the rate
``sum_i dO_i . (o_i(S) - o_i)``, which is the statistic ``signed`` summed over rows. So autograd's derivative by
epsilon, through full matrices and transformers' own masks, must give what the profile says.
"""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from moa_search.data import Sample
from moa_search.errors import ModelUnsupportedError
from moa_search.profiling import profile_samples
from tests.moa_search.architectures import ARCHITECTURES, SMALL, make_model

LENGTH, SINK, BLOCK = 120, 3, 16


@pytest.fixture(scope="module")
def sample():
    return Sample(np.random.default_rng(0).integers(3, 64, LENGTH), 4, "passkey", 0.5, "random")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_profile_is_the_derivative_of_the_loss(architecture, sample):
    model = make_model(architecture)
    profile = profile_samples(model, [sample], sink=SINK, block=BLOCK, row_buckets=4)
    entry = profile.by_length[LENGTH]
    native = [0] if "layer_types" in ARCHITECTURES[architecture] else []
    assert list(profile.header.native_layers) == native
    windows, kv_heads = entry.header.windows, profile.header.model.num_key_value_heads
    mix = torch.zeros(2, kv_heads, len(windows), dtype=torch.float64, requires_grad=True)
    loss = mixed_loss(model, sample, windows, mix)
    loss.backward()
    mix.grad[native] = 0  # such a layer isn't measured
    assert entry.loss[0] == pytest.approx(loss.item(), rel=1e-5)
    assert (mix.grad[-1, :, :-1] != 0).all()
    signed = torch.from_numpy(entry.per_sample["signed"][0].sum(-2)).double()
    torch.testing.assert_close(signed, mix.grad, rtol=1e-4, atol=1e-5 * mix.grad.abs().max().item())


def mixed_loss(model, sample, windows, mix, seen=lambda layer, key, value: (key, value)):
    """The loss of the answer when head h of layer l gives ``o + sum_w mix[l, h, w] * (o(w) - o)``.

    ``o(w)`` is over the keys and values that ``seen`` makes of a layer's.
    """

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        sinks = [] if s_aux is None else [s_aux[None, :, None, None].expand(*query.shape[:3], 1)]

        def output(key, value, hidden=None):
            keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
            scores = query @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores + attention_mask
            if hidden is not None:
                scores = scores.masked_fill(hidden, float("-inf"))
            return torch.cat([scores, *sinks], -1).softmax(-1)[..., : keys.shape[2]] @ values

        out = dense = output(key, value)
        seen_key, seen_value = (x.detach() for x in seen(module.layer_idx, key, value))
        i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        for index, window in enumerate(windows):
            shortened = output(seen_key, seen_value, (i - j >= window) & (j >= SINK))
            by_head = mix[module.layer_idx, :, index].repeat_interleave(group)[:, None, None]
            out = out + by_head * (shortened - dense)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("mixed", attend)
    AttentionMaskInterface.register("mixed", eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("mixed")
    try:
        logits = model(torch.from_numpy(sample.ids)[None], use_cache=False).logits[0, -sample.answer_tokens - 1 : -1]
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(sample.answer))
    finally:
        model.set_attn_implementation(before)


REFUSED = {
    "falcon": ({"head_dim": None}, "AttentionInterface"),
    "mistral": ({"sliding_window": 40}, r"every layer has a sliding window of its own \(40 tokens\)"),
    "deepseek_v3": ({"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}, "latent"),
    "gemma3n_text": ({"num_kv_shared_layers": 1}, "share one layer's keys"),
    "llama4_text": ({"attention_chunk_size": 32}, "chunked"),
    "bert": ({}, "not a causal language model"),
    "t5": ({}, "encoder-decoder"),
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_work_is_refused_before_the_first_token(architecture, sample, monkeypatch):
    changes, reason = REFUSED[architecture]
    fields = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
    config = AutoConfig.for_model(architecture, **fields)

    class Unloaded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config

    model = Unloaded()
    if architecture == "falcon":
        model = AutoModelForCausalLM.from_config(config)
        monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("a token was run"))
    with pytest.raises(ModelUnsupportedError, match=reason):
        profile_samples(model, [sample])
