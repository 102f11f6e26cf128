"""Held-out passkeys as text, for tasks of lm-evaluation-harness."""

from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from moa_search.tasks import TASKS

SAMPLES = 20


def make(tokenizer: str, max_seq_lengths: list[int], **others: Any) -> dict[str, Dataset]:
    """``SAMPLES`` prompts of about each length, with their answers."""
    encoder = AutoTokenizer.from_pretrained(tokenizer)
    rows = []
    for length in max_seq_lengths:
        for item in TASKS["passkey"].held_out(encoder, length=length, count=SAMPLES, seed=0):
            prompt, answer = (
                encoder.decode(ids, clean_up_tokenization_spaces=False) for ids in (item.prompt, item.answer)
            )
            rows.append({"prompt": prompt, "answer": answer.strip(), "length": length})
    return {"test": Dataset.from_list(rows)}
