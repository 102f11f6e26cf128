"""Plans run by the CPU library: copies of caches, types that don't fit, what `auto` means."""

from __future__ import annotations

import pickle

import pytest
import torch
from moa_kernels.cpu.library import unavailable

from moa_search.errors import BackendUnavailableError
from moa_search.runtime import MoACache, apply_plan, native
from moa_search.runtime.kernels import attends_by

from .explicit import explicit, logits, tiny_model, tiny_plan, tokens

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture
def prepared():
    model = tiny_model(dtype=torch.float32)
    plan = tiny_plan(model)
    reference = explicit(model, plan)
    return apply_plan(model, plan, impl="cpu"), plan, reference


@torch.no_grad()
def run(model, cache, part):
    return model(part, past_key_values=cache).logits


@pytest.mark.parametrize("clone", [MoACache.copy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_of_a_cache_that_has_decoded_go_their_own_ways(prepared, clone):
    model, plan, reference = prepared
    start, one, other = tokens(2, 60), tokens(2, 30, seed=1), tokens(2, 30, seed=2)
    cache = MoACache(model.config, plan)
    for part in start.split([50, *[1] * 10], 1):
        run(model, cache, part)
    copied = clone(cache)
    found = [
        (run(model, cache, a), run(model, copied, b)) for a, b in zip(one.split(1, 1), other.split(1, 1), strict=True)
    ]
    for branch, mine in zip((one, other), zip(*found, strict=True), strict=True):
        expected = logits(reference, torch.cat([start, branch], 1))[:, 60:]
        torch.testing.assert_close(torch.cat(mine, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_step_is_filled_in_once_per_layout(prepared, monkeypatch):
    model, plan, _ = prepared
    cache, made = MoACache(model.config, plan), []
    original = native.Step.__init__

    def counted(self, past, *rest):
        made.append(past.layout)  # kept, so that no other one gets its id
        original(self, past, *rest)

    monkeypatch.setattr(native.Step, "__init__", counted)
    run(model, cache, tokens(1, 40))
    for token in tokens(1, 60).split(1, 1):
        run(model, cache, token)
    assert len(cache.layers) <= len(made) == len(set(map(id, made))) < 60


@pytest.mark.parametrize("count", [1, 7])
def test_a_model_that_changed_its_type_goes_on_as_by_torch(prepared, count):
    """The library reads memory as the type that it is called for, so the cache has to follow."""
    _, plan, _ = prepared
    found = []
    for impl in ("cpu", "torch"):
        model = apply_plan(tiny_model(dtype=torch.float32), plan, impl=impl)
        cache = MoACache(model.config, plan)
        run(model, cache, tokens(1, 30))
        model.bfloat16()
        found.append(run(model, cache, tokens(1, count)).float())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05 * found[1].abs().max().item())


def test_gradients_go_the_torch_way_under_auto_and_are_an_error_under_cpu(prepared):
    model, plan, _ = prepared
    with pytest.raises(BackendUnavailableError, match=r"no gradient here; use torch.no_grad\(\)"):
        model(tokens(1, 20))
    apply_plan(model, plan)
    model(tokens(1, 20)).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_what_attends_is_said_in_words():
    assert attends_by(tiny_model(dtype=torch.float32)).startswith("cpu: vectors of ")
    assert attends_by(tiny_model(dtype=torch.float64)) == "torch"
