"""A model, and methods that compress what it keeps of a context."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .guessing import forward
from .kvzip import KVzip
from .names import ANSWERS_SCHEMA, CACHES
from .presses import make_press
from .quantised import quantised_cache
from .reading import Read


class Methods:
    """Answers items by any method.

    A context is read in one forward pass, as kvpress's own pipeline does, and compressed; then the question and the
    answer follow in one more. Where the question is known, it is compressed with the context, but for its last token,
    so that no method answers from the whole prompt.
    """

    def __init__(self, options: argparse.Namespace, texts: list[str]) -> None:
        source = {} if options.gguf_file is None else {"gguf_file": options.gguf_file}
        dtype = getattr(torch, options.dtype)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, attn_implementation="sdpa", **source)
        self.model = model.to(options.device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(options.model, **source)
        self._texts = texts
        self._versions = {name: found for name in ("kvpress", "transformers", "torch") if (found := _version(name))}

    @torch.no_grad()
    def answers(self, item: dict[str, Any], rivals: list[str], question: str) -> Iterator[dict[str, Any]]:
        """Lines of the answers; see `moa_search.evaluation.rivals.exchange`."""
        compressed, rest = list(item["context"]), list(item["question"])
        if question == "known":
            compressed, rest = compressed + rest[:-1], rest[-1:]
        read = Read(self.model, compressed)
        kvzip = KVzip(self.model, self.tokenizer, read)
        for rival in rivals:
            name, _, share = rival.partition("@")
            torch.manual_seed(0)  # Compactor draws a sketch
            read.forget_masks()
            read.spared_s = 0.0
            started = time.process_time()
            if name.startswith("kvzip"):
                cache, found = kvzip.masked(name, float(share))
            else:
                cache, found = self._compressed(read, name, float(share or 1))
            seconds = time.process_time() - started + read.seconds + read.spared_s
            found |= self._answer(cache, len(compressed), rest, item)
            yield {
                "schema": ANSWERS_SCHEMA,
                "id": item["id"],
                "rival": rival,
                "question": question,
                **found,
                "prefill_s": round(seconds, 3),
                "versions": self._versions,
            }

    def _compressed(self, read: Read, name: str, share: float) -> tuple[Any, dict[str, float]]:
        """A cache as a method leaves it, and what that costs."""
        if name in CACHES:
            return read.replayed(quantised_cache(self.model.config, CACHES[name]))
        if name == "full":
            return read.replayed()
        press = make_press(name, share, len(read.tokens), self.tokenizer, self._texts)
        press.post_init_from_model(self.model)
        scorer = getattr(press, "press", press)
        if hasattr(scorer, "score"):
            scorer.score = read.scored_once(name.removeprefix("adakv+"), share, scorer.score)
        return read.replayed(hook=press.forward_hook)

    def _answer(self, cache: Any, position: int, question: list[int], item: dict[str, Any]) -> dict[str, Any]:
        """What the model says of an answer that follows a question, or what it answers."""
        if "generate" in item:
            given, ids = [], question
            for _ in range(item["generate"]):
                logits = forward(self.model, cache, position, ids)
                position += len(ids)
                ids = [int(logits[-1].argmax())]
                given += ids
                if self._is_enough(given, item):
                    break
            return {"generated": given}
        answer = item["answer"]
        logits = forward(self.model, cache, position, question + answer[:-1])[-len(answer) :].float()
        wanted = torch.tensor(answer).to(logits.device, non_blocking=True)
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        nll, correct = torch.stack([losses, (logits.argmax(-1) == wanted).float()]).tolist()
        return {"nll": [round(loss, 6) for loss in nll], "correct": list(map(int, correct))}

    def _is_enough(self, given: list[int], item: dict[str, Any]) -> bool:
        """Whether an answer may end before its item's number of tokens."""
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
