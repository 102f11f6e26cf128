"""Teacher-forced scoring of samples.

The answer's tokens are predicted given the tokens before them. All of them ranked first is the same event as
greedy decoding printing the answer; a plan anchored at positions makes both paths compute the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moa_search.calibration import Sample

__all__ = ["AnswerScore", "score_answer"]


@dataclass(frozen=True)
class AnswerScore:
    """How a model rates one answer.

    Attributes:
        nll: Mean negative log-likelihood in nats per answer token.
        correct: Whether each answer token is ranked first, ``[answer]``.
    """

    nll: float
    correct: npt.NDArray[np.bool_]


@torch.no_grad()
def score_answer(model: Any, sample: Sample) -> AnswerScore:
    """One forward pass over prompt and answer."""
    ids = torch.from_numpy(sample.ids)[None].to(model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=sample.answer_tokens + 1).logits
    predicted = logits[0, -sample.answer_tokens - 1 : -1].float()
    answer = ids[0, -sample.answer_tokens :]
    nll = torch.nn.functional.cross_entropy(predicted, answer).item()
    return AnswerScore(nll, (predicted.argmax(-1) == answer).cpu().numpy())
