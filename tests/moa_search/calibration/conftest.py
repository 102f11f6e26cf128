"""Tokenizers of one token per byte, with and without a token at the start."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

START = "<s>"


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
