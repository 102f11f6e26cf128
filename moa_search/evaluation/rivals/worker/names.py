"""What the methods are called, and what the other environment and this one both have to know."""

ANSWERS_SCHEMA = "moa-answers/1"

DONE = "item"
"""What a line of the output begins with that says how many are done."""

SCORERS = {
    "streaming-llm": "StreamingLLMPress",
    "snapkv": "SnapKVPress",
    "expected-attention": "ExpectedAttentionPress",
    "tova": "TOVAPress",
    "keydiff": "KeyDiffPress",
    "compactor": "CompactorPress",
}
"""Presses that score every token and keep the same number of them in each head."""

COMPRESSORS = (
    *SCORERS,
    *(f"adakv+{name}" for name in SCORERS),
    "kvzip",
    "kvzip-layer",
    "kvzip-head",
    "duo-attention",
)
"""Methods that keep a share of the tokens."""

CACHES = {"quantized-cache-4": 4, "quantized-cache-2": 2}
"""transformers' QuantizedCache with quanto as its backend, by bits."""

NAMES = ("full", *COMPRESSORS, *CACHES)
"""Of methods; ``full`` compresses nothing, and shows that both environments compute the same."""

DUO_SAMPLES, DUO_TOKENS = 50, 500
"""Texts that DuoAttention on the fly looks at, and tokens of each."""
