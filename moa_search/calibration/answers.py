"""Greedy answers of the dense model, and whether they are right.

MoA found a model's own answers decisive: at a quarter of the cache, profiles from human answers kept 0.87 of
retrieval and those from the model's own 0.95 (arXiv 2406.14909).
"""

from __future__ import annotations

import contextlib
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_search.data.frames import Frame
from moa_search.errors import CalibrationError
from moa_search.parallel import Workers
from moa_search.tasks.items import Item

LONG_WORDS = 5
"""References from this many words on may be put in other words: see `is_right`."""

LEAST_F1 = 0.5

LEAST_COPIED = 4
"""A greedy copy goes astray sooner or later: SmolLM2-135M gets 4 tokens far in half of the cases at 1024 tokens, all
24 in none of 16."""

Tokens = npt.NDArray[np.int64]


@dataclass
class ModelAnswers:
    """The dense model's greedy answers, where they are right.

    Attributes:
        model: A causal language model; left as it was.
        tokenizer: Its tokenizer.
        frame: Tokens around the prompts.
        workers: Processes that share the items, each with its own copy of the model.
    """

    model: Any
    tokenizer: Any
    frame: Frame
    workers: Workers

    @property
    def at_once(self) -> int:
        """See `Answerer`."""
        return self.workers.count

    def __call__(self, items: Sequence[Item]) -> list[Tokens | None]:
        """See `Answerer`."""
        parts = self.workers.everywhere(self.workers.together(lambda: self._answered(self.workers.own(items))))
        return [parts[i % self.workers.count][i // self.workers.count] for i in range(len(items))]

    def _answered(self, items: Sequence[Item]) -> list[Tokens | None]:
        import torch

        stops = stop_tokens(self.model, self.tokenizer, self.frame)
        right: list[Tokens | None] = []
        with answering(self.model):
            for item in items:
                try:
                    answer = greedy_answer(self.model, self.tokenizer, item, stops)
                except torch.OutOfMemoryError:
                    raise CalibrationError(
                        f"answering a prompt of {len(item.prompt)} tokens doesn't fit the GPU's memory; try "
                        "--device-map auto, shorter --lengths or --answers dataset"
                    ) from None
                right.append(right_part(self.tokenizer, item, answer))
        return right


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """The model in eval mode and without generation settings of its own, such as a temperature; put back at the end."""
    from transformers import GenerationConfig

    before, training = model.generation_config, model.training
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        model.train(training)


def stop_tokens(model: Any, tokenizer: Any, frame: Frame) -> list[int]:
    """Tokens that end an answer: the model's, the tokenizer's and the chat template's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *frame.end.tolist()]
    return sorted({token for token in found if token is not None})


def greedy_answer(model: Any, tokenizer: Any, item: Item, stops: Sequence[int]) -> Tokens:
    """What the model answers, most likely token by token; nothing where it stays silent. Of copies, the right start.

    An answer that ends with its turn keeps the token that ends it, so that the end is supervised too.

    Args:
        model: A causal language model, as `answering` leaves it.
        tokenizer: Its tokenizer.
        item: What to answer.
        stops: See `stop_tokens`.
    """
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    if item.ends == "reference" and len(item.reference):
        agreed = _greedy_along_reference(model, item)
        if item.exact or len(agreed) == len(item.reference):
            return agreed
    prompt = torch.from_numpy(item.prompt)[None].to(model.device)
    asked = len(item.prompt)

    def ends_line(ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        return torch.tensor([_has_line(tokenizer, ids[0, asked:].tolist())], device=ids.device)

    config = GenerationConfig(
        max_new_tokens=item.target_length - asked,
        do_sample=False,
        eos_token_id=list(stops) if stops and item.ends != "reference" else None,
        pad_token_id=stops[0] if stops else 0,
    )
    criteria = StoppingCriteriaList([ends_line] if item.ends == "line" else [])
    mask = torch.ones_like(prompt)
    generated = model.generate(prompt, attention_mask=mask, generation_config=config, stopping_criteria=criteria)
    answer: list[int] = generated[0, asked:].tolist()
    if item.ends == "line":
        whole = (n for n in range(len(answer)) if answer[n] in stops or _has_line(tokenizer, answer[: n + 1]))
        answer = answer[: next(whole, len(answer))]
    return np.asarray(answer, dtype=np.int64)


def _greedy_along_reference(model: Any, item: Item) -> Tokens:
    """The greedy answer as long as it is the reference: one forward pass instead of one for each token."""
    import torch

    ids = torch.from_numpy(np.concatenate([item.prompt, item.reference]))[None].to(model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False, logits_to_keep=len(item.reference) + 1).logits
    greedy = logits[0, :-1].argmax(-1).cpu().numpy()
    wrong = np.flatnonzero(greedy != item.reference)
    return item.reference[: int(wrong[0])] if len(wrong) else item.reference


def _has_line(tokenizer: Any, answer: list[int]) -> bool:
    """Whether a line with something on it has ended."""
    return "\n" in _text(tokenizer, answer).lstrip()


def _text(tokenizer: Any, answer: Sequence[int] | Tokens) -> str:
    return str(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def right_part(tokenizer: Any, item: Item, answer: Tokens) -> Tokens | None:
    """What of an answer is right, None where too little is.

    A copy is right up to its first wrong token, and has to get `LEAST_COPIED` tokens far. Any other answer is right
    as a whole or not at all: it has to say something and, where there is a reference, to hold one of the accepted
    texts, case, punctuation and articles aside (as SQuAD compares answers). An answer to a free question whose
    reference is long, `LONG_WORDS` or more, may instead share words with it: F1 `LEAST_F1` or more.
    """
    if item.exact:
        same = min(len(answer), len(item.reference))
        wrong = np.flatnonzero(answer[:same] != item.reference[:same])
        copied = int(wrong[0]) if len(wrong) else same
        return answer[:copied] if copied >= LEAST_COPIED else None
    text = _text(tokenizer, answer)
    if not text.strip():
        return None
    free = item.ends != "reference"
    right = not item.accepted or any(_says(text, accepted, free=free) for accepted in item.accepted)
    return answer if right else None


def _says(text: str, accepted: str, *, free: bool) -> bool:
    wanted, given = normalised(accepted), normalised(text)
    if not wanted:  # nothing but punctuation or articles
        return accepted.strip().casefold() in text.casefold()
    if re.search(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9])", given):
        return True
    words = wanted.split()
    return free and len(words) >= LONG_WORDS and shared_words(given.split(), words) >= LEAST_F1


def shared_words(given: Sequence[str], wanted: Sequence[str]) -> float:
    """F1: the harmonic mean of the shares of words that two texts have in common."""
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and doubled spaces (SQuAD, arXiv 1606.05250)."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())
