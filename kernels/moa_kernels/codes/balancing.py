"""The matrix under which errors in all directions cost the same.

A code with one scale per vector puts an error of about the same variance e into every channel of ``k T``, with e
proportional to ``tr(T^T A T)``, A the covariance of keys. The score's error is then ``e tr(T^-1 B T^-T)``, B the second
moment of queries. The product of the two traces is least where both matrices are equal and diagonal, as in a balanced
realisation (Moore 1981, "Principal component analysis in linear systems"): the square of the sum of the roots of A B's
eigenvalues. A rotation behind T keeps the traces, and spreads the channels evenly.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3
"""Share of the mean variance that is added to every channel's, so that no matrix is nearly singular."""


def balance(spread: Tensor, harm: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """T with ``T^T spread T = c^2 T^-1 harm T^-T``, both diagonal, and that diagonal, decreasing; float64.

    c is chosen so that ``tr(T^T spread T) = tr(spread)``: numbers keep their size.

    A matrix of zeros, as of a head that was pruned, says nothing: it counts as the identity.

    Args:
        spread: Covariance of what is stored, ``[heads, width, width]``.
        harm: How much an error in each direction matters, ``[heads, width, width]``: for keys the second moment of the
            queries that see them.
        ridge: See `RIDGE`.

    Returns:
        ``[heads, width, width]`` and ``[heads, width]``.

    Raises:
        ValueError: A matrix isn't finite or not positive semidefinite.
    """
    spread, harm = _ridged(spread, ridge, "spread"), _ridged(harm, ridge, "harm")
    lower = torch.linalg.cholesky(spread)  # spread = lower @ lower.mT
    squares, basis = torch.linalg.eigh(lower.mT @ harm @ lower)
    values = squares.sqrt()  # [heads, width]: what both matrices have on their diagonals
    matrix = torch.linalg.solve_triangular(lower.mT, basis, upper=True) * values.sqrt()[:, None, :]
    size = spread.diagonal(dim1=-2, dim2=-1).sum(-1) / values.sum(-1)
    return (matrix * size.sqrt()[:, None, None]).flip(-1), (values * size[:, None]).flip(-1)


def _ridged(matrix: Tensor, ridge: float, name: str) -> Tensor:
    same = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    matrix = torch.where((matrix == 0).all(-1, keepdim=True).all(-2, keepdim=True), same, matrix.double())
    variance = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    if not matrix.isfinite().all() or (variance <= 0).any():
        raise ValueError(f"{name} must be finite, with no negative mean variance in any head")
    ridged = (matrix + matrix.mT) / 2 + ridge * variance[:, None, None] * same
    if torch.linalg.cholesky_ex(ridged).info.any():
        raise ValueError(f"{name} must be positive semidefinite")
    return ridged
