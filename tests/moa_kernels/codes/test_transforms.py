"""Transforms: inverse, scores and outputs over what is stored, rotations of any width."""

import pytest
import torch
from moa_kernels.codes import Transform, balance, hadamard

WIDTHS = (64, 80, 96, 112, 128, 256)


def random_transform(width, kv_heads=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    matrices = torch.randn(2, kv_heads, 4 * width, width, generator=rng, dtype=torch.float64)
    spread, harm = matrices.mT @ matrices / (4 * width)
    mean = torch.randn(kv_heads, width, generator=rng, dtype=torch.float64)
    return Transform.balanced(balance(spread, harm)[0], mean)


@pytest.mark.parametrize("width", [1, 8, 24, *WIDTHS])
def test_rotation_is_orthonormal_and_mixes_whole_blocks(width):
    matrix = hadamard(width)
    block = width & -width
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-14)
    mixed = matrix.ne(0).view(width // block, block, width // block, block)
    assert torch.equal(mixed.any(3).any(1), torch.eye(width // block, dtype=torch.bool))
    assert (matrix[matrix != 0].abs() == block**-0.5).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_rotation_leaves_no_channel_with_the_whole_of_a_constant_vector(width):
    share = (torch.ones(width, dtype=torch.float64) @ hadamard(width)).square() / width
    assert share.max() < 0.6


@pytest.mark.parametrize("width", WIDTHS)
def test_transforms_are_undone_exactly(width):
    x = 30 * torch.randn(2, 2, 40, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for transform in (Transform.rotation(2, width), random_transform(width)):
        assert torch.allclose(transform.invert(transform.apply(x)), x, rtol=0, atol=1e-10)


def test_some_heads_of_a_transform():
    transform = random_transform(16, kv_heads=4)
    x = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(4))
    assert torch.equal(transform.of([3, 1]).apply(x[[3, 1]]), transform.apply(x)[[3, 1]])


@pytest.mark.parametrize(
    ("matrix", "mean", "says"),
    [
        (torch.zeros(2, 8, 8), torch.zeros(2, 8), r"balance of KV heads \[0, 1\] has no inverse"),
        (torch.full((1, 8, 8), torch.nan), torch.zeros(1, 8), "must be finite"),
        (torch.eye(8)[None], torch.full((1, 8), torch.inf), "must be finite"),
        (torch.eye(8)[None], torch.zeros(1, 7), r"mean \(1, 7\)"),
        (torch.eye(8), torch.zeros(8), r"balance \(8, 8\)"),
    ],
)
def test_what_is_no_transform_is_refused(matrix, mean, says):
    with pytest.raises(ValueError, match=says):
        Transform.balanced(matrix, mean)
