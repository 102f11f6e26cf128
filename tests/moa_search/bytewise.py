"""Tokenizers of one token per byte: with and without a token at the start, and with a chat template."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

START = "<s>"
TURN, END = "<turn>", "<end>"
TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


WORDS = [
    "amber",
    "basin",
    "cedar",
    "delta",
    "ember",
    "field",
    "grove",
    "harbor",
    "island",
    "jungle",
    "kettle",
    "lantern",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOA_SEARCH_CACHE", str(tmp_path / "cache"))


def make_tokenizer(*, start: bool) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate([*alphabet, START])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    if start:
        bytewise.add_special_tokens([START])
        bytewise.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, bytewise.token_to_id(START))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bytewise)


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "with a start token"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(start=request.param)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(start=False)


def make_chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """The start token stands first in plain text and in a chat; a turn's end is the end of a sequence."""
    tokenizer = make_tokenizer(start=True)
    tokenizer.add_special_tokens({"eos_token": END, "additional_special_tokens": [TURN]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def with_template() -> Callable[[str], PreTrainedTokenizerFast]:
    return make_chat_tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return make_chat_tokenizer()


class Scripted(torch.nn.Module):
    """Stands in for a model: answers a prompt with what a function of its text says, and counts the prompts."""

    device = torch.device("cpu")

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.generation_config = object()
        self.asked: list[str] = []
        self._tokenizer, self._answer = tokenizer, answer

    def _tokens(self, ids):
        prompt = self._tokenizer.decode(ids)
        if self.asked[-1:] != [prompt]:
            self.asked.append(prompt)
        return self._tokenizer(self._answer(prompt), add_special_tokens=False)["input_ids"]

    def forward(self, ids, *, use_cache, logits_to_keep):
        said = self._tokens(ids[0, : ids.shape[1] - logits_to_keep + 1])
        logits = torch.zeros(1, logits_to_keep, len(self._tokenizer))
        for position, token in enumerate(said[:logits_to_keep]):
            logits[0, position, token] = 1
        return SimpleNamespace(logits=logits)

    def generate(self, ids, *, attention_mask, generation_config, stopping_criteria):
        assert attention_mask.shape == ids.shape == (1, ids.shape[1])
        assert not generation_config.do_sample
        assert not self.training
        for token in self._tokens(ids[0])[: generation_config.max_new_tokens]:
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
            stops = generation_config.eos_token_id or []
            if token in stops or stopping_criteria(ids, None).any():
                break
        return ids


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture(scope="session")
def records() -> list[dict[str, str]]:
    """Forty short contexts, each with a question about it."""
    rng = np.random.default_rng(0)
    words = np.array(WORDS)
    return [
        {
            "context": f"Report {n}. " + " ".join(rng.choice(words, 12)) + f". The code of box {n} is K{n:03}.",
            "question": f"What is the code of box {n}?",
            "answer": f"K{n:03}",
        }
        for n in range(40)
    ]
