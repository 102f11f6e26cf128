"""Draw `cells.DRAWN`: ``python draw.py items.jsonl.gz [MODEL]``.

The tasks' texts differ between Python versions; drawn once, all environments and machines answer the same items.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cells import DRAWN

from moa_search.data import Sample
from moa_search.data.texts import TextSource
from moa_search.evaluation.rivals.exchange import item_of
from moa_search.evaluation.rivals.worker import DUO_SAMPLES, DUO_TOKENS
from moa_search.modeling.loading import load_model
from moa_search.tasks import require_tasks
from moa_search.tasks.ruler.task import RulerTask


def described(sample: Sample, number: int) -> dict[str, Any]:
    """An item for the worker, with what its score needs."""
    item = item_of(sample, generated=False)
    supervised = None if sample.supervised is None else sample.supervised.astype(int).tolist()
    return {
        **item,
        "length": sample.target_length,
        "number": number,
        "depth": round(sample.depth, 6),
        "supervised": supervised,
        "room": sample.room,
    }


def main() -> None:
    path, model = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "demo"
    tokenizer = load_model(model)[1]
    source, rng = TextSource.library(tokenizer, "calibration"), np.random.default_rng(0)
    texts = [str(tokenizer.decode(source.cut(DUO_TOKENS, rng)[1])) for _ in range(DUO_SAMPLES)]
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"texts": texts}) + "\n")
        for (name, length), count in DRAWN.items():
            task = require_tasks([name])[0]
            samples = task.held_out(tokenizer, length=length, count=count, seed=0)
            records = task._made(tokenizer, length, count, 0) if isinstance(task, RulerTask) else [None] * count
            for number, (sample, record) in enumerate(zip(samples, records, strict=True)):
                item = described(sample, number)
                if record is not None:
                    item["texts"] = list(record.answer)
                file.write(json.dumps(item) + "\n")
            print(name, length, count, flush=True)


if __name__ == "__main__":
    main()
