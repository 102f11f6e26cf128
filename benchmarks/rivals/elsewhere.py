"""kvpress's methods on `cells.STAGES`, run by its own environment's Python: ``python elsewhere.py --items ...``.

Answers by `moa_search/evaluation/rivals/worker`, item by item, every method and setting, so that whenever it is stopped
all methods have answered the same items.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from cells import STAGES, is_enough, machine, mine, of_stage, read_items

FAILURES = 2


def main() -> None:
    options = _options()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    import kvpress  # noqa: F401  # its patches come before the model
    import torch

    torch.set_num_threads(1)
    # Without what is around it.
    sys.path.append(str(Path(__file__).parents[2] / "moa_search" / "evaluation" / "rivals"))
    from worker import DUO_SAMPLES, DUO_TOKENS
    from worker.methods import Methods

    class BriefMethods(Methods):  # type: ignore[misc]
        """Answers freely only from where an answer that holds all that is wanted isn't what the model would write."""

        def _answer(self, cache: Any, position: int, question: list[int], item: dict[str, Any]) -> dict[str, Any]:
            if "generate" not in item:
                return super()._answer(cache, position, question, item)  # type: ignore[no-any-return]
            answer = item["answer"]
            forced = {key: value for key, value in item.items() if key != "generate"}
            spare = copy.copy(cache)
            spare.layers = list(map(copy.copy, cache.layers))  # a pass gives a layer new tensors
            found = super()._answer(cache, position, question, forced)
            right = [*found["correct"], 0].index(0)
            self._before = given = answer[:right]
            if not is_enough(self.tokenizer, given, item):
                free = super()._answer(spare, position, question + given, item)
                given = given + free["generated"]
            return {**found, "generated": given}

        def _is_enough(self, given: list[int], item: dict[str, Any]) -> bool:
            return is_enough(self.tokenizer, self._before + given, item)

    items, texts = read_items(options.items)
    methods = BriefMethods(
        argparse.Namespace(model=options.model, gguf_file=None, dtype="bfloat16", device=options.device), texts
    )
    if options.duo_scores is not None:
        import numpy as np
        from kvpress.presses import duo_attention_press

        key = methods.model.config.name_or_path, DUO_SAMPLES, DUO_TOKENS
        duo_attention_press.cache[key] = np.load(options.duo_scores)
    where = machine(options.device)
    done = set()
    if options.out.exists():
        lines = map(json.loads, options.out.open())
        done = {(line["rival"], line["question"], line["id"], "generated" in line) for line in lines}
    failures = options.out.with_suffix(".failed")
    failed = Counter(failures.read_text().splitlines() if failures.exists() else ())
    with options.out.open("a", buffering=1) as out:
        for stage in STAGES:
            if options.stages and stage.name not in options.stages:
                continue
            for item in mine(list(of_stage(items, stage)), *options.shard):
                started = time.perf_counter()
                for question, rivals in (("unknown", stage.unknown), ("known", stage.known)):
                    wanted = [one for one in rivals if (one, question, item["id"], stage.generated) not in done]
                    while wanted := [one for one in wanted if failed[one] < FAILURES]:
                        try:
                            for line in methods.answers(item, list(wanted), question):
                                wanted.remove(line["rival"])
                                out.write(json.dumps({**line, "device": where["device"]}) + "\n")
                        except Exception:  # one method less; the others go on
                            rival, trace = wanted.pop(0), traceback.format_exc(limit=-4)
                            failed[rival] += 1
                            with failures.open("a") as file:
                                file.write(f"{rival}\n")
                            what = f"{rival}, question {question}: {item['task']} {item['length']}"
                            print(f"FAILED {what}\n{trace}", flush=True)
                            if "CUDA error" in trace:  # nothing runs any more in this process
                                sys.exit(1)
                out.flush()
                seconds = time.perf_counter() - started
                print(f"{stage.name} {item['task']} {item['length']} {item['number']}: {seconds:.1f} s", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--duo-scores", type=Path, help="of heads, found before: .npy, [layer, head]")
    parser.add_argument("--shard", type=int, nargs=2, default=[0, 1], metavar=("K", "OF"))
    parser.add_argument("--stages", nargs="*", default=[], choices=[stage.name for stage in STAGES])
    return parser.parse_args()


if __name__ == "__main__":
    main()
