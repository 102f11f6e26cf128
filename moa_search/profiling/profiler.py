"""Run calibration samples through a model and gather its influence statistics."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moa_kernels import backends as kernels
from moa_kernels.backends import Impl, choose
from moa_kernels.codes import BITS, token_bytes

from moa_search.data import Sample, hash_samples
from moa_search.errors import BackendUnavailableError, ConfigError, ModelUnsupportedError, ProfilingError
from moa_search.formats import ModelSignature
from moa_search.formats.files import one_line
from moa_search.formats.profile import Profile, RunSummary
from moa_search.formats.profile_content import LengthProfile, ProfileHeader
from moa_search.formats.transforms import KeyTransforms
from moa_search.modeling.loading import weights_hash
from moa_search.modeling.support import (
    native_windows,
    require_attention_interface,
    require_causal,
    require_context,
    require_own_keys,
)
from moa_search.modeling.text import dtype_name
from moa_search.parallel import ALONE, Workers
from moa_search.profiling.accumulate import LengthAccumulator
from moa_search.profiling.attention import observed
from moa_search.profiling.checkpointing import checkpointed
from moa_search.profiling.grid import ROW_BUCKETS, window_grid
from moa_search.profiling.measure import SampleMeter
from moa_search.profiling.memory import on_gpu, peak_memory_bytes, reset_peak_memory
from moa_search.profiling.results import Results
from moa_search.profiling.tiers import TierAccumulator, TierMeter
from moa_search.profiling.transforms import measure_transforms
from moa_search.progress import progress
from moa_search.spans import BLOCK_TOKENS, SINK_TOKENS
from moa_search.version import __version__

BYTES_PER_WEIGHT = 2
"""What a model is served with, whatever type it was profiled in."""


def profile_samples(
    model: Any,
    samples: Sequence[Sample],
    *,
    model_name: str = "",
    sink: int = SINK_TOKENS,
    block: int = BLOCK_TOKENS,
    row_buckets: int = ROW_BUCKETS,
    checkpointing: bool = True,
    seed: int = 0,
    calibration: dict[str, Any] | None = None,
    workers: Workers = ALONE,
    partial: Path | None = None,
    resume: bool = True,
    impl: Impl = "auto",
    tiers: Sequence[int] = (),
    transforms: Profile | None = None,
) -> Profile:
    """Measure the influence of shorter windows on every KV head.

    One forward and backward pass per sample, parameters without gradients; memory is linear in the length.

    Args:
        model: A transformers causal language model; its attention implementation is put back at the end.
        samples: Prompts with answers; all samples of one target length are pooled.
        model_name: Recorded in the profile.
        sink: First tokens that no window ever drops.
        block: Smallest window in tokens.
        row_buckets: Equal slices of the rows.
        checkpointing: Keep one layer's activations at a time and recompute the rest: less memory, about a
            third more time.
        seed: Recorded in the profile.
        calibration: Where the samples come from, recorded in the profile.
        workers: Processes that share the samples, each with its own model. The result doesn't depend on them.
        partial: Folder for the results of each sample, from which a killed run goes on; None keeps them in
            memory. It stays until `discard_results`.
        resume: Go on from what ``partial`` holds; False starts anew.
        impl: What computes the statistics: ``"triton"`` kernels, ``"torch"``, or ``"auto"``, Triton on GPUs.
        tiers: Bits of keys and values whose influence is measured, too; 16 goes without saying.
        transforms: A profile of this model whose transforms are used instead of measuring some.

    Returns:
        The profile, on every process.

    Raises:
        ModelUnsupportedError: The model's attention can't be observed.
        ConfigError: A sample is longer than the model's context, or ``partial`` holds another run's results.
        ProfilingError: A loss isn't finite, or transforms of keys can't be used.
        BackendUnavailableError: Triton was asked for and can't run.
    """
    if not samples:
        raise ConfigError("there are no calibration samples to profile")
    native = require_profilable(model, impl)
    signature, longest = ModelSignature.of(model.config), max(sample.length for sample in samples)
    require_context(model.config, longest)
    bits = coded_bits(tiers, signature.head_dim)
    fixed = None if transforms is None else _given(transforms, signature)
    if not bits and fixed is not None:
        raise ConfigError("transforms are about keys in fewer bits; name some with --tiers, such as 16 8 4 2")
    settings = {
        "library_version": __version__,
        "model": signature.model_dump(mode="json"),
        "weights": weights_hash(model),
        "dtype": dtype_name(model),
        "sink": sink,
        "block": block,
        "row_buckets": row_buckets,
        "seed": seed,
        "calibration": {
            **(calibration or {}),
            "samples": len(samples),
            "hash": hash_samples(samples),
            "sample_hashes": [hash_samples([sample]).removeprefix("sha256:")[:16] for sample in samples],
        },
        **({"tiers": {"bits": list(bits)}} if bits else {}),
        **({} if fixed is None else {"transforms": fixed.checksum}),
    }
    # Only the first process keeps results, so the others needn't reach its disk.
    results = workers.together(lambda: Results(partial if workers.is_first else None, settings, resume=resume))
    meter = SampleMeter(model, signature, sink, block, row_buckets, native, impl)
    if bits:

        def measured() -> dict[str, Any]:
            known = fixed or measure_transforms(model, samples, sink=sink, native=native)
            return known.tensors()

        tensors = workers.from_first(workers.by_first(lambda: results.once("transforms", measured)))
        assert tensors is not None
        try:
            found = KeyTransforms.of(tensors, signature)
        except ValueError as error:
            kept = "" if partial is None else "; a run before may have left them: start anew with --resume false"
            raise ProfilingError(f"transforms of keys can't be used ({one_line(error)}){kept}") from None
        meter = dataclasses.replace(meter, tiers=TierMeter(bits, found, impl))
    seconds = _measure_all(meter, samples, results, workers, checkpointing)

    pooled = workers.by_first(lambda: _pool(meter, samples, results, settings, model_name, seconds))
    profile = workers.from_first(pooled)
    assert profile is not None
    return profile


def require_profilable(model: Any, impl: Impl = "auto") -> dict[int, int]:
    """Check that a model's heads can be observed and given spans, and that what is to compute the statistics runs on
    its device and type.

    Returns:
        The layers that have a sliding window of their own, in tokens: they aren't measured.

    Raises:
        ModelUnsupportedError: They can't, or every layer has such a window; the message says why.
        BackendUnavailableError: Triton was asked for and can't run.
    """
    require_causal(model.config)
    require_own_keys(model.config)
    windows = native_windows(model.config)
    if windows and None not in windows:
        raise ModelUnsupportedError(
            f"{model.config.model_type}: every layer has a sliding window of its own ({windows[0]} tokens), so no "
            "head's span could be searched"
        )
    require_attention_interface(model)
    native = {layer: window for layer, window in enumerate(windows) if window is not None}
    states = torch.empty(0, dtype=model.dtype, device=model.device)
    try:
        choose(impl, states, head_dim=ModelSignature.of(model.config).head_dim)
    except kernels.BackendUnavailableError as error:
        raise BackendUnavailableError(str(error)) from None
    return native


def coded_bits(tiers: Sequence[int], head_dim: int) -> tuple[int, ...]:
    """The bits below 16 among ``tiers``, decreasing.

    Args:
        tiers: As a user gave them.
        head_dim: Numbers in a key.

    Raises:
        ConfigError: Bits that nothing stores, or that heads of this width don't pack into.
    """
    for bits in tiers:
        if bits not in BITS:
            raise ConfigError(f"tiers are {', '.join(map(str, tiers))}; choose from {', '.join(map(str, BITS))}")
        try:
            token_bytes(bits, head_dim)
        except ValueError as error:
            fitting = ", ".join(str(other) for other in BITS if _packs(other, head_dim))
            raise ConfigError(f"tier {bits}: {error}; leave it out of --tiers, this width takes {fitting}") from None
    return tuple(sorted({bits for bits in tiers if bits < 16}, reverse=True))


def _packs(bits: int, head_dim: int) -> bool:
    try:
        token_bytes(bits, head_dim)
    except ValueError:
        return False
    return True


def _given(profile: Profile, signature: ModelSignature) -> KeyTransforms:
    if profile.tiers is None:
        raise ConfigError("the profile given for --transforms has none; profile it with --tiers")
    profile.header.model.require(signature, "the profile given for --transforms")
    return profile.tiers.transforms


def _measure_all(
    meter: SampleMeter,
    samples: Sequence[Sample],
    results: Results,
    workers: Workers,
    checkpointing: bool,
) -> dict[int, list[float]]:
    """Measure what ``results`` lacks; the seconds of each sample, by target length, on the first process."""
    done = set(workers.from_first(results.numbers))
    left = [number for number in range(len(samples)) if number not in done]
    seconds: dict[int, list[float]] = {}
    reset_peak_memory()
    total = sum(sample.length for sample in samples)
    bar = progress(what="Profiling", unit="token", total=total, show=workers.is_first)
    with bar, observed(meter.model) as modules, checkpointed(meter.model, checkpointing):
        bar.update(sum(samples[number].length for number in done))
        for numbers in workers.rounds(left):
            mine = workers.own(numbers)
            measured = workers.together(lambda: [meter.measure(modules, samples[n], n) for n in mine])  # noqa: B023
            gathered = [result for part in workers.on_first(measured) for result in part]
            workers.together(lambda: results.put(dict(zip(numbers, gathered, strict=False))))  # noqa: B023
            for number, result in zip(numbers, gathered, strict=False):
                seconds.setdefault(samples[number].target_length, []).append(result.seconds)
            bar.update(sum(samples[number].length for number in numbers))
    return seconds


def _pool(
    meter: SampleMeter,
    samples: Sequence[Sample],
    results: Results,
    settings: dict[str, Any],
    model_name: str,
    seconds: dict[int, list[float]],
) -> Profile:
    """The profile of all samples, pooled in their order."""
    import transformers

    gathered: dict[int, LengthAccumulator] = {}
    tiers = None if meter.tiers is None else TierAccumulator(meter.tiers)
    for sample, result in zip(samples, results.in_order(), strict=True):
        length = sample.target_length
        pool = gathered.setdefault(
            length, LengthAccumulator(length, window_grid(length, meter.block), meter.row_buckets)
        )
        pool.add(result.loss, result.statistics)
        if tiers is not None:
            tiers.add(length, int(sample.counted.sum()), result.statistics)
    by_length: dict[int, LengthProfile] = {length: pool.result() for length, pool in sorted(gathered.items())}
    header = ProfileHeader(
        model=meter.signature,
        model_name=model_name,
        dtype=settings["dtype"],
        sink=meter.sink,
        block=meter.block,
        seed=settings["seed"],
        calibration=settings["calibration"],
        lengths=tuple(entry.header for entry in by_length.values()),
        native_layers=tuple(meter.native),
        weights_hash=settings["weights"],
        tiers=None if meter.tiers is None else meter.tiers.header(list(by_length)),
        weights_bytes=BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in meter.model.parameters()),
        versions={
            "python": ".".join(map(str, sys.version_info[:3])),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    run = RunSummary(
        measured=sum(map(len, seconds.values())),
        resumed=len(samples) - sum(map(len, seconds.values())),
        seconds_per_sample={length: float(np.median(times)) for length, times in sorted(seconds.items())},
        peak_memory_bytes=peak_memory_bytes(meter.model),
        on_gpu=on_gpu(meter.model),
    )
    return Profile(header, by_length, run, None if tiers is None else tiers.result())
