"""A model's answer to one sample, teacher-forced or generated.

Teacher-forced, the answer's tokens are predicted given the tokens before them. All of them ranked first is the same
event as greedy decoding printing the answer; a plan anchored at positions makes both paths compute the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moa_search.calibration.answers import answering
from moa_search.data import Sample
from moa_search.tasks import AnswerMode, Task

ROWS_AT_ONCE = 1024
"""Answer tokens that are scored together: the float32 logits of a whole document would take gigabytes."""


@dataclass(frozen=True)
class AnswerScore:
    """How a model rates one answer.

    Attributes:
        losses: Negative log-likelihood in nats of each supervised answer token, ``[answer]``; not numbers where it was
            generated.
        correct: Whether each answer token is ranked first, or was generated, ``[answer]``.
        given: Token ids of a generated answer that is scored as a whole.
    """

    losses: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]
    given: npt.NDArray[np.int64] | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood in nats per answer token."""
        return float(self.losses.mean())


@dataclass(frozen=True)
class Score:
    """What one item, or one slice of it, says.

    Attributes:
        depth: Where in the item, 0 (start) to 1 (end).
        nll: Mean negative log-likelihood in nats per answer token; not a number where the answer was generated.
        score: 0 to 1.
    """

    depth: float
    nll: float
    score: float


def score_item(model: Any, task: Task, sample: Sample, answers: AnswerMode) -> list[Score]:
    """Have one item of a task answered and scored, in the task's slices.

    Args:
        model: A causal language model, under a plan or not.
        task: Made the item.
        sample: The item.
        answers: How it is answered, where the task leaves a choice.
    """
    return readings(
        task, sample, (score_answer if task.answer_mode(answers) == "forced" else generate_answer)(model, sample)
    )


def readings(task: Task, sample: Sample, answer: AnswerScore) -> list[Score]:
    """What a task makes of one answer, in its slices.

    Args:
        task: Made the item.
        sample: The item.
        answer: However it came about.
    """
    if answer.given is not None and sample.grade is not None:
        return [Score(sample.depth, math.nan, sample.grade(answer.given))]
    if task.slices == 1:
        return [Score(sample.depth, answer.nll, task.score(answer.correct))]
    parts = zip(np.array_split(answer.losses, task.slices), np.array_split(answer.correct, task.slices), strict=True)
    return [
        Score((number + 0.5) / task.slices, float(losses.mean()), task.score(correct))
        for number, (losses, correct) in enumerate(parts)
    ]


@torch.no_grad()
def score_answer(model: Any, sample: Sample) -> AnswerScore:
    """One forward pass over prompt and answer."""
    ids = torch.from_numpy(sample.ids)[None].to(model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=sample.answer_tokens + 1).logits[0]
    predicted, answer = logits[-sample.answer_tokens - 1 : -1], ids[0, -sample.answer_tokens :]
    losses, correct = [], []
    for rows, wanted in zip(predicted.split(ROWS_AT_ONCE), answer.split(ROWS_AT_ONCE), strict=True):
        losses.append(torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="none").double())
        correct.append(rows.argmax(-1) == wanted)
    counts = sample.counted
    return AnswerScore(torch.cat(losses).cpu().numpy()[counts], torch.cat(correct).cpu().numpy()[counts])


def generate_answer(model: Any, sample: Sample) -> AnswerScore:
    """Greedy decoding of as many tokens as the answer has, or its room."""
    return generated(sample, generate_tokens(model, sample.prompt, sample.generated_tokens))


def generated(sample: Sample, given: npt.NDArray[np.int64]) -> AnswerScore:
    """A generated answer as compared with the sample's own.

    Args:
        sample: The item.
        given: As many tokens as `Sample.generated_tokens`.
    """
    if sample.grade is not None:
        return AnswerScore(np.empty(0), np.empty(0, bool), given)
    counts = sample.counted
    return AnswerScore(np.full(sample.answer_tokens, np.nan)[counts], (given == sample.answer)[counts])


@torch.no_grad()
def generate_tokens(model: Any, prompt: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """What greedy decoding adds to a prompt.

    Args:
        model: A causal language model; settings of its own, such as a temperature, are left aside.
        prompt: Token ids, ``[prompt]``.
        count: Tokens.
    """
    ids = torch.from_numpy(prompt)[None].to(model.device)
    with answering(model):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return np.asarray(out[0, len(prompt) :].cpu().numpy(), dtype=np.int64)
