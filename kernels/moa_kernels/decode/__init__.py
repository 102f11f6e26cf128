"""Attention of the newest tokens over a ragged ring cache (decoding), where every KV head has its own span."""

from moa_kernels.decode.op import MOST_NEW_TOKENS, span_decode

__all__ = ["MOST_NEW_TOKENS", "span_decode"]
