"""Influence of shorter windows on the loss: one pass over a layer's attention, backwards.

For a query row i with attention ``A_ij``, output gradient ``dO_i`` and ``g_ij = dO_i . v_j``, restricting the
row to a kept set S renormalises its softmax, and the loss changes to first order by

    delta_i(S) = dO_i . (o_i(S) - o_i) = (sum_S A_ij g_ij) / (sum_S A_ij) - D_i,    D_i = sum_j A_ij g_ij

so two running sums per row, over keys ordered from nearest to farthest after the sink, give every window at
once.
"""

from moa_kernels.influence.op import influence_statistics
from moa_kernels.influence.reference import STATISTICS

__all__ = ["STATISTICS", "influence_statistics"]
