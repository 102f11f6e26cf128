"""The command. Answers are appended one by one; a run that was stopped goes on after those that are there."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

from .names import COMPRESSORS, DONE


def main() -> None:
    """Answer every item with every rival."""
    options = _options()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    lines = [json.loads(line) for line in options.items.read_text().splitlines()]
    items = [line for line in lines if "id" in line]
    texts: list[str] = next((line["texts"] for line in lines if "texts" in line), [])
    done = set()
    if options.answers.exists():
        whole = [line for line in options.answers.read_text().splitlines(keepends=True) if line.endswith("\n")]
        options.answers.write_text("".join(whole))  # a line that was cut off is computed again
        done = {(answer["rival"], answer["question"], answer["id"]) for answer in map(json.loads, whole)}
    wanted = {
        (question, item["id"]): [rival for rival in options.rivals if (rival, question, item["id"]) not in done]
        for question in options.questions
        for item in items
    }
    total = sum(bool(missing) for missing in wanted.values())
    if not total:
        return
    if any(rival.partition("@")[0] in COMPRESSORS for rivals in wanted.values() for rival in rivals):
        import kvpress  # noqa: F401  # before the model is loaded, for it may be missing
    from .methods import Methods

    methods, number = Methods(options, texts), 0
    with options.answers.open("a") as file:
        for question in options.questions:
            for item in items:
                missing = wanted[question, item["id"]]
                if missing:
                    number += 1
                    for answer in methods.answers(item, missing, question):
                        file.write(json.dumps(answer) + "\n")
                        file.flush()
                    print(f"{DONE} {number} of {total}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer items with kvpress's methods.")
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--gguf-file", help="file in that folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rivals", nargs="+", required=True, help="NAME or NAME@SHARE")
    parser.add_argument("--questions", nargs="+", default=["unknown", "known"], choices=["unknown", "known"])
    return parser.parse_args()
