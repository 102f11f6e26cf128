"""Draw `cells.DRAWN`: ``python draw.py items.jsonl.gz``; ``--only turns ruler`` draws some tasks.

The tasks' texts differ between Python versions; drawn once, all environments and machines answer the same items.
"""

from __future__ import annotations

import argparse
import gzip
import json
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
from moa_search.tasks.ruler.records import RulerRecord
from moa_search.tasks.ruler.task import RulerTask, sample_of


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("items", type=Path)
    parser.add_argument("--model", default="demo", help="whose tokenizer counts")
    known = sorted({name.partition(":")[0] for name, _ in DRAWN})
    parser.add_argument("--only", nargs="*", choices=known, help="tasks; 'ruler' is all of RULER's")
    parser.add_argument("--lengths", type=int, nargs="*")
    options = parser.parse_args()
    tokenizer = load_model(options.model)[1]
    source, rng = TextSource.library(tokenizer, "calibration"), np.random.default_rng(0)
    texts = [str(tokenizer.decode(source.cut(DUO_TOKENS, rng)[1])) for _ in range(DUO_SAMPLES)]
    with gzip.open(options.items, "wt") as file:
        file.write(json.dumps({"texts": texts}) + "\n")
        for (name, length), count in DRAWN.items():
            if options.only and name.partition(":")[0] not in options.only:
                continue
            if options.lengths and length not in options.lengths:
                continue
            task = require_tasks([name])[0]
            records: list[RulerRecord | None] = [None] * count
            if isinstance(task, RulerTask):
                made = task._made(tokenizer, length, count, 0)
                records, samples = [*made], [sample_of(tokenizer, record, length, name) for record in made]
            else:
                samples = task.held_out(tokenizer, length=length, count=count, seed=0)
            for number, (sample, record) in enumerate(zip(samples, records, strict=True)):
                item = described(sample, number)
                if record is not None:
                    item["texts"] = list(record.answer)
                file.write(json.dumps(item) + "\n")
            print(name, length, count, flush=True)


if __name__ == "__main__":
    main()
