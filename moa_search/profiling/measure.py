"""One sample through the model: a forward pass, and a backward pass that shows what each window would cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from moa_kernels.backends import Impl
from torch.nn import functional

from moa_search.data import Sample
from moa_search.errors import ModelUnsupportedError, ProfilingError
from moa_search.formats import ModelSignature
from moa_search.profiling.attention import Recorder, record_into
from moa_search.profiling.grid import window_grid
from moa_search.profiling.results import SampleResult
from moa_search.profiling.tiers import TierMeter

HALF_LOSS_SCALE = 2.0**14
"""Gradients of long samples are below float16's smallest number: its loss is scaled up, the results down."""

SCALE_STEP = 2.0**4

LOSS_POWER = {"squared": 2, "signed": 1, "absolute": 1, "elementwise": 1, "recall": 0}
"""How each statistic grows with the loss."""


def answer_loss(model: Any, sample: Sample) -> torch.Tensor:
    """Loss over the answer in nats per token, whose gradient reaches activations but no parameter."""
    embed = model.get_input_embeddings()
    ids = torch.from_numpy(sample.ids)[None].to(embed.weight.device)
    embeddings = embed(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=sample.answer_tokens + 1).logits
    predicted = logits[0, -sample.answer_tokens - 1 : -1].float()
    wanted = ids[0, -sample.answer_tokens :].to(predicted.device)
    if sample.supervised is not None:
        counts = torch.from_numpy(sample.supervised).to(predicted.device)
        predicted, wanted = predicted[counts], wanted[counts]
    return functional.cross_entropy(predicted, wanted)


@dataclass(frozen=True)
class SampleMeter:
    """Measures samples with one model.

    Attributes:
        model: A causal language model.
        signature: Its layers and heads.
        sink: First tokens that no window ever drops.
        block: Smallest window in tokens.
        row_buckets: Equal slices of the rows.
        native: Layers with a sliding window of their own, in tokens; they aren't measured.
        impl: Which implementation computes the statistics, as in `moa_kernels.backends`.
        tiers: Measures the changes by codecs, too; None for spans alone.
    """

    model: Any
    signature: ModelSignature
    sink: int
    block: int
    row_buckets: int
    native: dict[int, int]
    impl: Impl = "auto"
    tiers: TierMeter | None = None

    def measure(self, modules: list[Any], sample: Sample, number: int) -> SampleResult:
        """Loss and statistics of one sample.

        Args:
            modules: The model's, under `moa_search.profiling.attention.observed`.
            sample: What to measure.
            number: Names it in errors.

        Raises:
            ProfilingError: The loss or a gradient isn't finite.
            ModelUnsupportedError: A layer's attention wasn't seen.
        """
        began = time.perf_counter()
        which = f"sample {number} ({sample.task}, {sample.length} tokens)"
        scale = HALF_LOSS_SCALE if self.model.dtype == torch.float16 else 1.0
        while True:
            recorder = self._recorder(sample)
            record_into(modules, recorder)
            try:
                loss = self._backward(sample, scale)
            except torch.OutOfMemoryError:
                raise ProfilingError(
                    f"{which} doesn't fit the GPU's memory; try --checkpointing true, --device-map auto or shorter "
                    "--lengths"
                ) from None
            if not math.isfinite(loss):
                raise ProfilingError(
                    f"the loss of {which} is {loss}; try --dtype float32, or check the model's weights"
                )
            statistics = self._stack(recorder, scale)
            if all(np.isfinite(values).all() for values in statistics.values()):
                break
            if scale == 1:
                raise ProfilingError(f"the gradients of {which} aren't finite; try --dtype float32")
            scale = max(1.0, scale / SCALE_STEP)
        return SampleResult(loss, statistics, time.perf_counter() - began)

    def _recorder(self, sample: Sample) -> Recorder:
        length = sample.target_length
        return Recorder(
            windows=window_grid(length, self.block),
            row_buckets=self.row_buckets,
            bucket_rows=-(-length // self.row_buckets),
            sink=self.sink,
            native=self.native,
            length=length,
            impl=self.impl,
            tiers=self.tiers,
        )

    def _backward(self, sample: Sample, scale: float) -> float:
        """The loss; its gradient, times ``scale``, flows through the activations."""
        loss = answer_loss(self.model, sample)
        (loss * scale).backward()
        return loss.item()

    def _stack(self, recorder: Recorder, scale: float) -> dict[str, npt.NDArray[np.float32]]:
        """One sample's statistics as ``[layer, kv_head, bucket, window]``; zero in native layers."""
        layers = range(self.signature.num_hidden_layers)
        missing = [layer for layer in layers if layer not in recorder.layers and layer not in recorder.native]
        if missing:
            name = type(self.model).__name__
            raise ModelUnsupportedError(f"{name}: layers {missing} never called the attention interface")
        by_statistic = {}
        for statistic in next(iter(recorder.layers.values())):
            found = {layer: values[statistic].float() for layer, values in recorder.layers.items()}
            zeros = torch.zeros_like(next(iter(found.values())))
            power = LOSS_POWER[statistic.rpartition("/")[2]]  # a change is named after its statistic
            by_statistic[statistic] = torch.stack([found.get(i, zeros) for i in layers]).div_(scale**power).numpy()
        return by_statistic
