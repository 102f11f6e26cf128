"""Storing new keys and values in a ragged ring cache, all heads at once."""

from moa_kernels.append.op import append_tokens

__all__ = ["append_tokens"]
