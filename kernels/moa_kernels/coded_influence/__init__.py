"""Influence of shorter windows and of coded keys and values together, from the same backward pass.

What a row keeps comes back from a codec, but for the sink. With ``A~_ij`` the attention over coded keys and ``g~_ij =
dO_i . v~_j`` over coded values, the loss changes to first order by

    delta_i(S) = dO_i . (o~_i(S) - o_i) = (sum_S A~_ij g~_ij) / (sum_S A~_ij) - D_i,    D_i = dO_i . o_i

so each pair of codecs takes two running sums more than `moa_kernels.influence`, and each codec one product. Where a row
keeps every key, delta is the difference of two ``D``.
"""

from moa_kernels.coded_influence.op import coded_changes
from moa_kernels.coded_influence.reference import CODED_STATISTICS

__all__ = ["CODED_STATISTICS", "coded_changes"]
