from tests.moa_search.bytewise import (
    chat_tokenizer,
    own_cache,
    plain_tokenizer,
    records,
    scripted,
    tokenizer,
    with_template,
)
from tests.moa_search.evaluation.conftest import tiny_model

__all__ = [
    "chat_tokenizer",
    "own_cache",
    "plain_tokenizer",
    "records",
    "scripted",
    "tiny_model",
    "tokenizer",
    "with_template",
]
