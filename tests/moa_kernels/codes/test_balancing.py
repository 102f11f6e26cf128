"""The balancing matrix: balanced, the best there is, and robust."""

import pytest
import torch
from moa_kernels.codes import Moments, balance


def moments(width=24, heads=3, seed=0):
    """Covariances with spectra over some decades."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 1, width, dtype=torch.float64)
    factors = torch.randn(2, heads, width, width, generator=rng, dtype=torch.float64) * sizes
    turns = torch.linalg.qr(torch.randn(2, heads, width, width, generator=rng, dtype=torch.float64)).Q
    factors = factors @ turns
    return factors.mT @ factors


def cost(matrix, spread, harm):
    """Of scores under one scale per vector: the product of the two traces."""
    inverse = torch.linalg.inv(matrix)
    stored, missed = matrix.mT @ spread @ matrix, inverse @ harm @ inverse.mT
    return (stored.diagonal(dim1=-2, dim2=-1).sum(-1) * missed.diagonal(dim1=-2, dim2=-1).sum(-1)).sqrt()


def test_both_matrices_become_one_diagonal_up_to_a_factor():
    spread, harm = moments()
    matrix, _ = balance(spread, harm, ridge=0)
    inverse = torch.linalg.inv(matrix)
    stored, missed = matrix.mT @ spread @ matrix, inverse @ harm @ inverse.mT
    ratio = stored.diagonal(dim1=-2, dim2=-1).sum(-1) / missed.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(stored, ratio[:, None, None] * missed, rtol=0, atol=1e-8 * stored.abs().max().item())
    off = stored - torch.diag_embed(stored.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() <= 1e-8 * stored.abs().max()


def test_the_cost_is_the_lower_bound_and_far_below_none():
    spread, harm = moments()
    bound = torch.linalg.eigvals(spread @ harm).real.clamp_min(0).sqrt().sum(-1)  # sum of Hankel singular values
    found = cost(balance(spread, harm, ridge=0)[0], spread, harm)
    assert torch.allclose(found, bound, rtol=1e-6)
    none = cost(torch.eye(24, dtype=torch.float64).expand(3, -1, -1), spread, harm)
    assert (found < 0.7 * none).all()
    other = torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert (found <= cost(other, spread, harm)).all()


def test_numbers_keep_their_size():
    spread, harm = moments()
    matrix, _ = balance(spread, harm, ridge=0)
    stored = (matrix.mT @ spread @ matrix).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(stored, spread.diagonal(dim1=-2, dim2=-1).sum(-1))


@pytest.mark.parametrize("rank", [1, 5])
def test_moments_of_few_tokens_still_give_a_matrix_with_an_inverse(rank):
    few = torch.randn(2, 3, rank, 24, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    matrix, _ = balance(*(few.mT @ few))
    assert torch.linalg.cond(matrix).max() < 1e4


def test_a_head_that_says_nothing_counts_as_alike_in_all_directions():
    """A pruned head has keys, or queries, of zeros; the other heads keep their matrices."""
    spread, harm = moments()
    whole, same = balance(spread, harm)[0], torch.eye(24, dtype=torch.float64)
    spread[1], harm[2] = 0, 0
    matrix, _ = balance(spread, harm)
    torch.testing.assert_close(matrix[0], whole[0])
    torch.testing.assert_close(matrix[1], balance(same[None], harm[1:2])[0][0])
    torch.testing.assert_close(matrix[2], balance(spread[2:], same[None])[0][0])


def test_keys_that_are_all_alike_are_their_mean():
    rng = torch.Generator().manual_seed(0)
    bias, query, value = (torch.randn(2, rows, 16, generator=rng) for rows in (1, 500, 500))
    matrix, mean, _ = Moments.of(query, bias.expand(-1, 500, -1), value).key_statics()
    torch.testing.assert_close(mean, bias[:, 0])
    assert torch.linalg.cond(matrix).max() < 1e4


@pytest.mark.parametrize("bad", [torch.full((1, 4, 4), torch.nan), -torch.eye(4)[None]])
def test_what_is_no_second_moment_is_refused(bad):
    with pytest.raises(ValueError, match="spread must be finite"):
        balance(bad, torch.eye(4)[None])
    with pytest.raises(ValueError, match="harm must be finite"):
        balance(torch.eye(4)[None], bad)


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(ValueError, match="spread must be positive semidefinite"):
        balance(torch.diag(torch.tensor([3.0, -1.0]))[None], torch.eye(2)[None])
