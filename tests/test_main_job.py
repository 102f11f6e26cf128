"""The main job on the real demo model, with the shipped profile: the promises of the README."""

from pathlib import Path

import pytest
import torch

from moa_search import MoACache, Plan, Profile, apply_plan, load_model, remove_plan, search_front, search_plan
from moa_search.data import hash_samples
from moa_search.evaluation import compare_variants, make_variants
from moa_search.formats import ModelSignature
from moa_search.masks import head_masks
from moa_search.tasks import build_samples

SHIPPED = Path(__file__).parents[1] / "profiles" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", dtype="float32")


@pytest.fixture(scope="module")
def profile():
    return Profile.load(SHIPPED / "profile.safetensors")


def test_shipped_profile_fits_the_demo_model(demo, profile):
    profile.header.model.require(ModelSignature.of(demo[0].config), "the shipped profile")


def test_shipped_profile_is_of_the_samples_that_its_configuration_draws(demo, profile):
    """The standard library's texts differ between Python versions; the profile names the one it was made with."""
    import platform

    header = profile.header
    if platform.python_version() != header.versions["python"]:
        assert header.calibration["hash"].startswith("sha256:")
        return
    drawn = [
        sample
        for entry in header.lengths
        for sample in build_samples(
            demo[1], length=entry.length, count=entry.samples, seed=header.seed, split="calibration"
        )
    ]
    assert hash_samples(drawn) == header.calibration["hash"]


@pytest.mark.parametrize(("name", "density"), [("half", 0.5), ("quarter", 0.25), ("eighth", 0.125)])
def test_shipped_plans_are_what_the_search_finds(profile, name, density):
    shipped = Plan.load(SHIPPED / f"{name}.json")
    first, second = (search_front(profile, density=[density], front_steps=0).chosen for _ in range(2))
    assert first.dumps() == second.dumps()
    for length in profile.lengths:
        assert shipped.density(length) <= density
    assert shipped.provenance.profile == profile.checksum
    assert shipped.provenance.gap <= 1e-4
    if first.provenance.versions == shipped.provenance.versions:
        assert first.patterns == shipped.patterns
        # Sums differ in their last digits between processors, and so do bounds.
        assert first.provenance.objective == pytest.approx(shipped.provenance.objective, rel=1e-9)
        assert first.provenance.dual_bound == pytest.approx(shipped.provenance.dual_bound, rel=1e-6)


def test_generation_equals_whole_forward_passes_under_explicit_masks(demo, profile):
    """Greedy tokens under a plan, with rings that wrapped, are those of eager attention with per-head masks."""
    model, tokenizer = demo
    plan = search_plan(profile, density=0.125)
    text = (SHIPPED.parents[1] / "CONTRIBUTING.md").read_text() * 3
    prompt = tokenizer(text, return_tensors="pt")["input_ids"][:, :600]
    apply_plan(model, plan)
    try:
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    finally:
        remove_plan(model)
    cache = out.past_key_values
    assert isinstance(cache, MoACache)
    smallest = min(min(spans) for spans in plan.spans(600))
    assert smallest < 300, "some ring has wrapped"
    logits = explicit_logits(model, plan, out.sequences)
    expected = logits[0, prompt.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(out.sequences[0, prompt.shape[1] :], expected)


def explicit_logits(model, plan, ids):
    """Logits of a forward pass in which layer l's eager attention gets a 4-D mask of its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.models.llama.modeling_llama import eager_attention_forward

    group, length = plan.model.group, ids.shape[1]

    def masked(module, query, key, value, attention_mask, **kwargs):
        kept = head_masks(plan.rules[module.layer_idx], group, length, sink=plan.sink, min_span=plan.min_span)
        mask = torch.zeros(kept.shape, dtype=query.dtype).masked_fill(~torch.from_numpy(kept), float("-inf"))
        return eager_attention_forward(module, query, key, value, mask[None], **kwargs)

    AttentionInterface.register("explicit_4d", masked)
    AttentionMaskInterface.register("explicit_4d", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("explicit_4d")
    try:
        with torch.no_grad():
            return model(ids, use_cache=False).logits
    finally:
        model.set_attn_implementation(before)


def test_per_head_spans_beat_a_uniform_window_at_equal_memory(profile):
    """The point of it all, on eight held-out items; docs/results.md has the table over forty."""
    plan = search_plan(profile, density=0.25)
    items = compare_variants(
        *load_model("demo"), make_variants([{"the plan": plan}], ["dense", "uniform"]).variants,
        tasks=["passkey", "copy"], lengths=[1024], count=4, seed=1,
    )  # fmt: skip
    nll = items.groupby(["task", "variant"])["nll"].mean().unstack()
    gap = (nll["the plan"] - nll["dense"]) / (nll["uniform like the plan"] - nll["dense"])
    assert (gap < 0.6).all(), nll


def test_cache_holds_what_the_density_says(demo, profile):
    model, _ = demo
    plan = search_plan(profile, density=0.25)
    signature, width = plan.model, 2 * plan.model.head_dim * 4
    heads = signature.num_hidden_layers * signature.num_key_value_heads
    apply_plan(model, plan)
    try:
        cache = MoACache(model.config, plan)
        with torch.no_grad():
            for length in (100, 700):
                ids = torch.randint(0, 1000, (1, length - cache.get_seq_length()))
                model(ids, past_key_values=cache, use_cache=True)
                kept = sum(map(sum, plan.spans(length))) * width
                assert kept <= cache.nbytes <= kept + heads * plan.block * width
    finally:
        remove_plan(model)
