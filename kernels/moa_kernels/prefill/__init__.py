"""Attention of a prompt, or of a chunk of one, in which every KV head attends its own spans."""

from moa_kernels.prefill.op import span_prefill

__all__ = ["span_prefill"]
