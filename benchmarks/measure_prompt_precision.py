"""Whether a prompt's own queries should see its keys and values as they are, or as the cache gives them back.

    python benchmarks/measure_prompt_precision.py PLAN.json [PLAN.json ...] --length 1024 --items 20

The project codes at entry: then chunks, prefixes and turns give what one pass gives. The other way keeps a prompt
precise within one forward pass, and gives another answer for every way to cut it. Answer NLL both ways, same items.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch

from moa_search import MoACache, Plan, apply_plan, load_model, remove_plan
from moa_search.runtime.codecs import LayerCodecs
from moa_search.tasks import build_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--items", type=int, default=20)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load_model("demo")
    for task in ("passkey", "copy"):
        samples = build_samples(
            tokenizer, length=options.length, count=options.items, seed=31, split="test", tasks=[task]
        )
        dense = np.array([answer_nll(model, sample, {}) for sample in samples])
        print(f"{task}: dense {dense.mean():.3f}, n = {len(samples)}", flush=True)
        for path in options.plans:
            plan = Plan.load(path)
            apply_plan(model, plan)
            ways: list[list[float]] = [[], []]
            for sample, (way, found) in product(samples, enumerate(ways)):
                cache = MoACache(model.config, plan)
                found.append(answer_nll(model, sample, {"past_key_values": cache}, precise=bool(way)))
            coded, precise = map(np.array, ways)
            remove_plan(model)
            saved = precise - coded
            error = saved.std(ddof=1) / len(saved) ** 0.5
            print(f"  {path}: coded at entry {coded.mean():.3f}, precise prompt {precise.mean():.3f}, ", end="")
            print(f"difference {saved.mean():+.3f} +- {1.96 * error:.3f}", flush=True)


def answer_nll(model: Any, sample: Any, options: dict[str, Any], precise: bool = False) -> float:
    """Mean negative log-likelihood in nats of the answer's tokens, read after the prompt in a pass of their own."""
    ids = torch.from_numpy(sample.ids)[None]
    cut = ids.shape[1] - sample.answer_tokens
    unchanged = mock.patch.object(LayerCodecs, "seen", lambda self, key, value, *args: (key, value))
    with unchanged if precise else nullcontext():
        first = model(ids[:, :cut], logits_to_keep=1, use_cache=True, **options)
    rest = model(ids[:, cut:-1], past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits[0], rest.logits[0]]).float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, cut:]))


if __name__ == "__main__":
    main()
