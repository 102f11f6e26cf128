"""One profiling pass beside the dense forward and backward pass that it follows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from moa_kernels.influence import STATISTICS, influence_statistics
from timing import Case, Run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DIM, GROUP, KV_HEADS, SINK, BLOCK, BUCKETS = 128, 4, 8, 64, 64, 32


def cases(lengths: list[int], device: torch.device) -> Iterator[Case]:
    """One sample of each length."""
    for length in lengths:
        yield _case(length, device)


def windows_of(length: int) -> list[int]:
    """Every block up to 16 blocks, then six per octave in whole blocks, then everything."""
    windows, size = [BLOCK * k for k in range(1, 17)], 16.0
    while BLOCK * size < length:
        size *= 2 ** (1 / 6)
        windows.append(BLOCK * round(size))
    return [*sorted({window for window in windows if window < length}), length]


def _case(length: int, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(length)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group, kv_heads = (GROUP, KV_HEADS) if device.type == "cuda" else (1, 2)

    def randn(heads: int) -> Tensor:
        return torch.randn(1, heads, length, DIM, generator=generator, device=device, dtype=dtype)

    query, key, value, grad = randn(group * kv_heads), randn(kv_heads), randn(kv_heads), randn(group * kv_heads)
    windows = windows_of(length)
    settings = {
        "windows": windows, "row_buckets": BUCKETS, "bucket_rows": -(-length // BUCKETS),
        "sink": min(SINK, length // 8), "scale": DIM**-0.5,
    }  # fmt: skip
    inputs = [states[0] for states in (query, key, value, grad)]
    run = partial(influence_statistics, *inputs, impl="triton", **settings)
    return Case(
        kernel="influence",
        name=f"{length} tokens, {len(windows)} windows",
        shapes={"query": list(query.shape[1:]), "key": list(key.shape[1:]), "dtype": str(dtype).split(".")[1]},
        run=run,
        verify=partial(_verify, inputs, settings, run),
        references={"dense forward + backward": partial(_both_ways, query, key, value, grad)},
    )


def _verify(inputs: list[Tensor], settings: dict[str, object], run: Run) -> None:
    """Against the torch reference on one KV head, which itself is tested against float64 matrices."""
    found = run()
    group = inputs[0].shape[0] // inputs[1].shape[0]
    part = [inputs[0][:group], inputs[1][:1], inputs[2][:1], inputs[3][:group]]
    expected = influence_statistics(*part, impl="torch", **settings)
    for name in STATISTICS:
        scale = expected["absolute" if name == "signed" else name].abs().max()
        error = (found[name][:1] - expected[name]).abs().max() / scale
        assert error < 2e-2, f"{name}: {error:.2e} of the largest"


def _both_ways(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> Run:
    group = query.shape[1] // key.shape[1]
    leaves = [x.repeat_interleave(group, 1) if x.shape[1] < query.shape[1] else x for x in (query, key, value)]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    backend = SDPBackend.FLASH_ATTENTION if query.device.type == "cuda" else SDPBackend.MATH

    def run() -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(*leaves, is_causal=True)
        return torch.autograd.grad(out, leaves, grad)

    return run
