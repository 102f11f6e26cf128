"""A pass over a cache that kvpress has masked: in each masked key's place it needs one that no query sees."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def forward(model: Any, cache: Any, position: int, tokens: list[int]) -> Any:
    """Logits ``[token, vocabulary]`` after tokens that follow what a cache holds."""
    before = [cache.get_seq_length(layer) for layer in range(len(cache.layers))]
    ids = torch.tensor([tokens]).to(model.device, non_blocking=True)
    at = torch.arange(position, position + len(tokens), device=ids.device)[None]

    def logits() -> Any:
        return model(input_ids=ids, past_key_values=cache, position_ids=at).logits[0]

    def cut() -> None:
        for layer, length in zip(cache.layers, before, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    with guessing() as failed:
        found = logits()
    if not failed or not torch.stack(failed).any():
        return found
    cut()
    try:
        return logits()
    except ValueError as error:  # kvpress finds no key that all of these queries pass over
        if "fake keys" not in str(error) or len(tokens) == 1:
            raise
    cut()
    return torch.cat([forward(model, cache, position + i, [token]) for i, token in enumerate(tokens)])


@contextmanager
def guessing() -> Iterator[list[Any]]:
    """Have kvpress take its first guess at a key that no query sees, which is enough in most cases, without looking.

    Looking, in every layer, makes the CPU wait for a GPU; once for a pass is enough.

    Yields:
        Of every guess, whether it failed, on the model's device; to be read after the block.
    """
    failed: list[Any] = []
    patch = sys.modules.get("kvpress.attention_patch")
    if patch is None:
        yield failed
        return
    search = patch.search_hyperplane

    def guess(queries: Any, *rest: Any, **options: Any) -> Any:
        """See kvpress's ``search_hyperplane``, of which this is the first round."""
        if queries.dtype == torch.float16:
            return search(queries, *rest, **options)
        plane = queries.mean(1)
        failed.append((torch.bmm(queries, plane.unsqueeze(-1)) <= 0).any())
        return -1e5 * plane / plane.norm(dim=-1, keepdim=True) ** 2

    patch.search_hyperplane = guess  # type: ignore[attr-defined]
    try:
        yield failed
    finally:
        patch.search_hyperplane = search  # type: ignore[attr-defined]
