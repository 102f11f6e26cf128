"""kvpress's presses, set as in its own benchmark."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from .names import SCORERS


def make_press(name: str, share: float, tokens: int, tokenizer: Any, texts: list[str]) -> Any:
    """A press of kvpress.

    Args:
        name: One of `COMPRESSORS` but KVzip's.
        share: Of the tokens, which it keeps.
        tokens: Of the context.
        tokenizer: The model's.
        texts: That DuoAttention finds its heads by.
    """
    import kvpress

    if name.startswith("adakv+"):
        return kvpress.AdaKVPress(make_press(name.removeprefix("adakv+"), share, tokens, tokenizer, texts))
    if name == "duo-attention":
        return _duo_attention(share, tokens, tokenizer, texts)
    # Without this epsilon, which kvpress's own board has, its values' norms decide alone where attention is small.
    options = {"epsilon": 1e-2} if name == "expected-attention" else {}
    return getattr(kvpress, SCORERS[name])(compression_ratio=1 - share, **options)


def _duo_attention(share: float, tokens: int, tokenizer: Any, texts: list[str]) -> Any:
    """DuoAttention by kvpress's scores of heads on the fly, over texts of ours in place of BookSum's."""
    import pandas as pd
    from kvpress.presses import duo_attention_press

    class Duo(duo_attention_press.DuoAttentionPress):  # type: ignore[misc]
        """Its own 128 + 256 tokens in streaming heads, or a quarter of the share where that is less."""

        def post_init_from_model(self, model: Any) -> None:
            kept = min(384, max(8, int(share * tokens / 4)))
            self.head_compression_ratio = min(1.0, (1 - share) / (1 - kept / tokens))
            super().post_init_from_model(model)
            self.sink_size, self.recent_size = kept // 3, kept - kept // 3

    def load_texts(*names: Any, **options: Any) -> Any:
        return SimpleNamespace(to_pandas=lambda: pd.DataFrame({"chapter": texts}))

    duo_attention_press.load_dataset = load_texts
    duo_attention_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *names, **options: tokenizer)
    return Duo(on_the_fly_scoring=True)
