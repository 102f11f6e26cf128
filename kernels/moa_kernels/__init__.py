"""Attention kernels for per-head spans, each beside a plain torch reference; torch and Triton only."""

from moa_kernels.span_attention import span_attention

__all__ = ["span_attention"]
