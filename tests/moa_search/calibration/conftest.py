from tests.moa_search.bytewise import (
    chat_tokenizer,
    own_cache,
    plain_tokenizer,
    records,
    scripted,
    tokenizer,
    with_template,
)

__all__ = ["chat_tokenizer", "own_cache", "plain_tokenizer", "records", "scripted", "tokenizer", "with_template"]
