"""Items for another environment, and its answers, as JSON lines.

Items, schema ``moa-items/1``: a first line ``{"schema": ..., "texts": [...]}`` with texts that calibration may use, for
methods that calibrate themselves; then one line for each item:

* ``id``: a hash of its tokens, which its answers name;
* ``context``, ``question``, ``answer``: token ids; the prompt is context and question;
* ``generate``: in place of ``answer``, how many tokens to answer greedily.

Answers, schema ``moa-answers/1``, one line for each item, rival and setting:

* ``id``, ``rival`` (as typed), ``question`` (``unknown`` or ``known`` when the context is compressed);
* ``nll`` in nats and ``correct`` (ranked first: 1 or 0) of each answer token; or ``generated``, token ids;
* ``kept``: share of the context's tokens that attention still reads; ``held``, ``peak``: bytes of the cache after the
  context was read and at most while it was, in shares of a dense cache of it in the model's type;
* ``extra_passes``: tokens read beyond the context's own, in contexts; ``prefill_s``: CPU seconds; ``versions``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from moa_search.data import Sample
from moa_search.errors import FileFormatError
from moa_search.evaluation.rivals.worker import ANSWERS_SCHEMA
from moa_search.formats.files import atomic_write, canonical_json, one_line, sha256_of

ITEMS_SCHEMA: Final = "moa-items/1"


def item_of(sample: Sample, *, generated: bool) -> dict[str, Any]:
    """The line of one item.

    Args:
        sample: Its prompt needs at least two tokens. Where nothing tells its question apart, its last token stands for
            it.
        generated: Whether it is to be answered freely.
    """
    asked = max(1, sample.question_tokens)
    assert len(sample.prompt) > asked, "an item needs a context before its question"
    item: dict[str, Any] = {
        "context": sample.prompt[:-asked].tolist(),
        "question": sample.prompt[-asked:].tolist(),
    }
    item |= {"generate": sample.generated_tokens} if generated else {"answer": sample.answer.tolist()}
    return {"id": sha256_of(canonical_json(item)).removeprefix("sha256:")[:24], "task": sample.task, **item}


def write_items(items: Iterable[Mapping[str, Any]], texts: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Write a file of items."""
    lines = [{"schema": ITEMS_SCHEMA, "texts": list(texts)}, *items]
    with atomic_write(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def read_answers(path: str | os.PathLike[str]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Answers by rival as typed, question setting and item.

    Raises:
        FileFormatError: The file is no file of answers.
    """
    found = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            answer = json.loads(line)
            if answer["schema"] != ANSWERS_SCHEMA:
                raise ValueError(f"schema {one_line(answer['schema'])} is unknown")
            found[answer["rival"], answer["question"], answer["id"]] = answer
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{path}: line {number} is no answer of a rival ({one_line(str(error))})") from error
    return found
