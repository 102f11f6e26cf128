"""One profiling pass beside the dense forward and backward pass that it follows; over codes, beside the plain one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from moa_kernels.coded_influence import coded_changes
from moa_kernels.influence import STATISTICS, influence_statistics
from timing import Case, Run, Skipped
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DIM, GROUP, KV_HEADS, SINK, BLOCK, BUCKETS = 128, 4, 8, 64, 64, 32

CODES = (0.005, 0.1, 0.35)
"""Relative errors of vectors in 8, 4 and 2 bits."""

LONGEST_BY_TORCH = 32768


def cases(lengths: list[int], device: torch.device) -> Iterator[Case]:
    """One sample of each length: spans alone, then tiers 16 8 4 2 as profiles measure them."""
    for length in lengths:
        yield _case(length, device)
        yield _coded_case(length, device)


def windows_of(length: int) -> list[int]:
    """Every block up to 16 blocks, then six per octave in whole blocks, then everything."""
    windows, size = [BLOCK * k for k in range(1, 17)], 16.0
    while BLOCK * size < length:
        size *= 2 ** (1 / 6)
        windows.append(BLOCK * round(size))
    return [*sorted({window for window in windows if window < length}), length]


def _drawn(length: int, device: torch.device) -> list[Tensor]:
    """Query, key, value and gradient, ``[1, heads, length, DIM]``."""
    generator = torch.Generator(device).manual_seed(length)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group, kv_heads = (GROUP, KV_HEADS) if device.type == "cuda" else (1, 2)
    heads = (group * kv_heads, kv_heads, kv_heads, group * kv_heads)
    return [torch.randn(1, count, length, DIM, generator=generator, device=device, dtype=dtype) for count in heads]


def _settings(length: int) -> dict[str, object]:
    return {
        "windows": windows_of(length), "row_buckets": BUCKETS, "bucket_rows": -(-length // BUCKETS),
        "sink": min(SINK, length // 8), "scale": DIM**-0.5,
    }  # fmt: skip


def _case(length: int, device: torch.device) -> Case:
    query, key, value, grad = _drawn(length, device)
    settings = _settings(length)
    inputs = [states[0] for states in (query, key, value, grad)]
    run = partial(influence_statistics, *inputs, impl="triton", **settings)
    return Case(
        kernel="influence",
        name=f"{length} tokens, {len(windows_of(length))} windows",
        shapes={"query": list(query.shape[1:]), "key": list(key.shape[1:]), "dtype": str(query.dtype).split(".")[1]},
        run=run,
        verify=partial(_verify, inputs, settings, run),
        references={"dense forward + backward": partial(_both_ways, query, key, value, grad)},
    )


def _coded_case(length: int, device: torch.device) -> Case:
    query, key, value, grad = (states[0] for states in _drawn(length, device))
    settings = _settings(length)
    keys, values = (_coded(states, int(settings["sink"])) for states in (key, value))
    inputs = [query, keys, values, grad]
    asked = {**settings, "windows": [length], "row_buckets": 1, "bucket_rows": length}
    run = partial(coded_changes, *inputs, impl="triton", **asked)
    return Case(
        kernel="coded_influence",
        name=f"{length} tokens, {len(CODES)} codecs of keys and of values",
        shapes={"query": list(query.shape), "keys": list(keys.shape), "dtype": str(query.dtype).split(".")[1]},
        run=run,
        verify=partial(_verify_coded, inputs, asked, run),
        references={
            "influence of windows": lambda: partial(
                influence_statistics, query, key, value, grad, impl="triton", **settings
            ),
            "torch": partial(_by_torch, inputs, asked),
        },
    )


def _coded(states: Tensor, sink: int) -> Tensor:
    """``[codec, heads, length, DIM]``: plain, then off as far as what comes back from codes."""
    generator = torch.Generator(states.device).manual_seed(0)
    seen = [states]
    for error in CODES:
        noise = torch.randn(states.shape, generator=generator, device=states.device, dtype=states.dtype) * error
        noise[:, :sink] = 0
        seen.append(states + noise)
    return torch.stack(seen)


def _by_torch(inputs: list[Tensor], settings: dict[str, object]) -> Run:
    if inputs[0].shape[1] > LONGEST_BY_TORCH:
        raise Skipped(f"seconds a run beyond {LONGEST_BY_TORCH} tokens")
    return partial(coded_changes, *inputs, impl="torch", **settings)


def _verify_coded(inputs: list[Tensor], settings: dict[str, object], run: Run) -> None:
    """Against the torch reference on one KV head."""
    found, group = run(), inputs[0].shape[0] // inputs[1].shape[1]
    part = [inputs[0][:group], inputs[1][:, :1], inputs[2][:, :1], inputs[3][:group]]
    expected = coded_changes(*part, impl="torch", **settings)
    # Signed terms cancel: by the root of their squares' sum times the number of rows, they are of this size at most.
    terms = (expected["squared"].abs() * inputs[0].shape[1] * group).sqrt()
    for name, size in (("squared", expected["squared"].abs()), ("signed", terms)):
        error = ((found[name][:1] - expected[name]).abs() / size).max()
        assert error < 2e-2, f"{name}: {error:.2e} of its size"


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
