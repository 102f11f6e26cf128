"""Dense caches in fewer bits."""

import pytest
import torch

from moa_search.errors import ModelUnsupportedError
from moa_search.evaluation.rivals.codes import SCHEMES, coded
from moa_search.evaluation.rivals.naming import CODED


@pytest.fixture
def vectors():
    return torch.randn(2, 3, 50, 64, generator=torch.Generator().manual_seed(0))


def test_every_name_has_a_scheme():
    assert tuple(SCHEMES) == CODED


def test_int8_reaches_the_largest_magnitude_and_is_off_by_half_a_step_at_most(vectors):
    seen, step = SCHEMES["int8"].seen(vectors), vectors.abs().amax(-1, keepdim=True) / 127
    assert ((seen - vectors).abs() <= step / 2 + 1e-6).all()
    assert torch.allclose(seen.abs().amax(-1), vectors.abs().amax(-1))


def test_int4_without_rotation_has_sixteen_levels_from_the_least_to_the_largest():
    x = torch.arange(16.0)[None] * 0.5 - 2  # its own levels
    assert torch.allclose(SCHEMES["int4-plain"].seen(x), x)
    other = torch.tensor([[-1.0, 0.0, 0.31, 14.0]])  # step 1, zero point 1
    assert torch.allclose(SCHEMES["int4-plain"].seen(other), torch.tensor([[-1.0, 0.0, 0.0, 14.0]]))


def test_a_rotation_saves_a_vector_with_an_outlier(vectors):
    vectors[..., 5] *= 30
    errors = {name: (SCHEMES[name].seen(vectors) - vectors)[..., :5].square().mean() for name in CODED}
    assert errors["int8"] < errors["int4"] < 0.2 * errors["int4-plain"]


@pytest.mark.parametrize("name", CODED)
def test_a_token_is_coded_by_itself(name, vectors):
    scheme = SCHEMES[name]
    assert torch.allclose(scheme.seen(vectors)[:, :, 7], scheme.seen(vectors[:, :, 7]), atol=1e-5)
    assert torch.isfinite(scheme.seen(torch.zeros(1, 64))).all()
    assert scheme.seen(vectors.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "width", "bytes_each"), [("int8", 128, 132), ("int4", 128, 68), ("int4", 64, 36)])
def test_bytes_are_those_of_vllm(name, width, bytes_each):
    assert SCHEMES[name].share(width) == bytes_each / (2 * width)


def test_a_model_sees_coded_keys_and_values_and_is_dense_again(tiny_model):
    model, ids = tiny_model[0], torch.arange(100)[None] % 250
    with torch.no_grad():
        dense = model(ids).logits
        for name, most in (("int8", 0.02), ("int4", 0.3)):
            with coded(model, SCHEMES[name]):
                seen = model(ids).logits
                stepwise = model(ids[:, 80:], past_key_values=model(ids[:, :80]).past_key_values).logits
            assert 0 < (seen - dense).norm() / dense.norm() < most
            assert torch.allclose(seen[:, 80:], stepwise, atol=1e-4), "chunks see the same codes"
        assert torch.equal(model(ids).logits, dense)


def test_attention_that_has_no_name_is_refused(tiny_model):
    model = tiny_model[0]
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(ModelUnsupportedError, match="load it with sdpa"), coded(model, SCHEMES["int8"]):
            pass
    finally:
        model.set_attn_implementation("sdpa")
