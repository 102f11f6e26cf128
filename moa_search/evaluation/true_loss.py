"""The loss of a model that really runs under a plan, on held-out samples, measured once.

A front's plans and the trials of an outer search are compared by it: by one number, since the samples are the same
for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moa_search.data import Sample, hash_samples
from moa_search.errors import ConfigError, MoAError
from moa_search.evaluation.compare import under
from moa_search.evaluation.loss_cache import DENSE_PLAN, LossCache, LossKey
from moa_search.evaluation.scoring import score_answer
from moa_search.formats import Plan
from moa_search.formats.provenance import Validation
from moa_search.modeling.loading import weights_hash
from moa_search.modeling.text import dtype_name
from moa_search.progress import progress
from moa_search.runtime import remove_plan

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over samples.

    Attributes:
        value: The mean.
        error: Its standard error; None where a source has but one sample of some length, so that nothing tells.
    """

    value: float
    error: float | None


class TrueLoss:
    """Losses of one model under any plan, on fixed samples.

    Every measurement is kept per plan and length, so that a run that is killed loses one of them at most. The model
    is dense after each call, whatever happened in it; a plan that it was under before is taken off.

    Args:
        model: A transformers decoder, in eval mode.
        samples: Held-out samples of one or several lengths and sources.
        cache: Keeps what was measured; by default for this object alone.

    Attributes:
        samples: The samples.
        data_hash: Hash of all of them.
        data_hashes: Hash of those of each length; a sample's length is its ``target_length``, in tokens.

    Raises:
        ConfigError: There is no sample.
    """

    def __init__(self, model: Any, samples: Sequence[Sample], cache: LossCache | None = None) -> None:
        if not samples:
            raise ConfigError("there are no samples to measure a loss on")
        self.samples = tuple(samples)
        self.data_hash = hash_samples(self.samples)
        self._model = model
        self._cache = LossCache() if cache is None else cache
        self._weights = weights_hash(model)
        self._items: dict[int, list[int]] = {}
        for item, sample in enumerate(self.samples):
            self._items.setdefault(sample.target_length, []).append(item)
        self.data_hashes = {
            length: hash_samples(self.samples[item] for item in items) for length, items in self._items.items()
        }

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the samples in tokens, in the order of appearance."""
        return tuple(self._items)

    @property
    def tokens(self) -> int:
        """Tokens of all samples: the work of measuring one plan."""
        return sum(length * len(items) for length, items in self._items.items())

    def samples_at(self, length: int) -> int:
        """How many samples of a length there are."""
        return len(self._items[length])

    def loss(self, plan: Plan | None) -> Losses:
        """Mean negative log-likelihood of every sample's answer, teacher-forced.

        A plan that is anchored at the prompt's end runs with its spans for the samples' length.

        Args:
            plan: The plan; None for dense attention.

        Returns:
            Nats per answer token, ``[sample]``.

        Raises:
            ModelMismatchError: The plan was made for another model.
            MoAError: A loss isn't finite, or a sample doesn't fit the GPU's memory.
        """
        remove_plan(self._model)
        losses = np.empty(len(self.samples))
        with progress(what="Measuring losses", unit="token", total=self.tokens) as bar:
            for length, items in self._items.items():
                key = self._key(plan, length)
                found = self._cache.get(key, len(items))
                if found is None:
                    found = self._measured(plan, length, bar.update)
                    self._cache.put(key, found)
                else:
                    bar.update(length * len(items))
                losses[items] = found
        return losses

    def mean(self, values: Losses, length: int | None = None) -> Estimate:
        """Mean over the lengths of means over the sources of means over samples.

        So each length counts the same, and each source within it, however many samples they have. Sources are what
        was typed for them, or tasks. The standard error takes samples as drawn independently from each source. For
        the difference of two plans pass the difference of their losses: it is paired.

        Args:
            values: One number per sample, ``[sample]``.
            length: One length alone, in tokens; None for all.
        """
        parts = [self._mean_at(values, at) for at in (self._items if length is None else (length,))]
        return _combined(parts)

    def evaluate(self, plan: Plan | None) -> float:
        """The plan's `loss` as its `mean`: one number to minimise, in nats per answer token."""
        return self.mean(self.loss(plan)).value

    def validations(self, plan: Plan) -> tuple[Validation, ...]:
        """The plan's loss and the dense one at each length, as `Plan.validated` keeps them."""
        dense, losses = self.loss(None), self.loss(plan)
        entries = []
        for length in self.lengths:
            estimate = self.mean(losses, length)
            entries.append(
                Validation(
                    length=length,
                    data=self.data_hashes[length],
                    samples=self.samples_at(length),
                    loss=estimate.value,
                    loss_error=estimate.error,
                    dense_loss=self.mean(dense, length).value,
                )
            )
        return tuple(entries)

    def _key(self, plan: Plan | None, length: int) -> LossKey:
        fingerprint = DENSE_PLAN if plan is None else plan.fingerprint
        dtype = dtype_name(self._model)
        return LossKey(fingerprint, self._weights, dtype, self.data_hashes[length], length)

    def _measured(self, plan: Plan | None, length: int, report: Callable[[int], None]) -> tuple[float, ...]:
        losses = []
        with under(self._model, None if plan is None else plan.resolve(length)):
            for item in self._items[length]:
                losses.append(self._scored(self.samples[item]))
                report(length)
        return tuple(losses)

    def _scored(self, sample: Sample) -> float:
        which = f"a {sample.task} sample of {sample.length} tokens"
        try:
            loss = score_answer(self._model, sample).nll
        except torch.OutOfMemoryError:
            raise MoAError(f"{which} doesn't fit the GPU's memory; try shorter --lengths or --dtype bfloat16") from None
        if not math.isfinite(loss):
            raise MoAError(f"the loss of {which} is {loss}; try --dtype bfloat16 or float32")
        return loss

    def _mean_at(self, values: Losses, length: int) -> Estimate:
        by_source: dict[str, list[float]] = {}
        for item in self._items[length]:
            sample = self.samples[item]
            by_source.setdefault(sample.source or sample.task, []).append(float(values[item]))
        return _combined([_sample_mean(group) for group in by_source.values()])


def _sample_mean(values: Sequence[float]) -> Estimate:
    count = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else None
    return Estimate(float(np.mean(values)), error)


def _combined(parts: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates."""
    errors = [part.error for part in parts if part.error is not None]
    error = math.hypot(*errors) / len(parts) if len(errors) == len(parts) else None
    return Estimate(sum(part.value for part in parts) / len(parts), error)
