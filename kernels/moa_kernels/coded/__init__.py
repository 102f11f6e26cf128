"""Attention over rings of codes, and their writing: `moa_kernels.codes.storage` says where everything is."""

from moa_kernels.coded.op import append_codes, decode_codes, see_tokens, stored_states

__all__ = ["append_codes", "decode_codes", "see_tokens", "stored_states"]
