"""Answers items with kvpress's methods and transformers' quantised caches, in an environment of its own.

kvpress 0.5 needs transformers below 5.3 and this library 5.4 or newer, so both never share one: nothing here imports
moa_search, and the other environment's Python runs this folder, ``python worker --items ITEMS --answers ANSWERS
--model MODEL --rivals ...``. So its files name one another relatively. `moa_search.evaluation.rivals.exchange`
describes both files.
"""

from .names import ANSWERS_SCHEMA, CACHES, COMPRESSORS, DONE, DUO_SAMPLES, DUO_TOKENS, NAMES

__all__ = ["ANSWERS_SCHEMA", "CACHES", "COMPRESSORS", "DONE", "DUO_SAMPLES", "DUO_TOKENS", "NAMES"]
