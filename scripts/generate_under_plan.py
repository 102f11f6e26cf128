"""Answer one long prompt dense and under a plan, and show what each keeps in its KV cache.

Usage: python scripts/generate_under_plan.py PLAN.json [TOKENS]
"""

import sys

import torch
from transformers.utils import logging

from moa_search import MoACache, Plan, apply_plan, load_model
from moa_search.errors import MoAError
from moa_search.tasks import build_samples


def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        plan = Plan.load(sys.argv[1])
    except MoAError as error:
        sys.exit(f"error: {error}")
    length = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
    logging.disable_progress_bar()
    model, tokenizer = load_model("demo")
    sample = build_samples(tokenizer, length=length, count=1, seed=7, split="test", tasks=["passkey"])[0]
    prompt = torch.from_numpy(sample.prompt)[None]
    print(f"{length} tokens of text hide a passkey at {sample.depth:.0%} of the way.")
    print(f"{'right answer':>14}: {tokenizer.decode(sample.answer).strip()}")
    generate(model, tokenizer, prompt, "dense")
    apply_plan(model, plan)
    generate(model, tokenizer, prompt, "under the plan")


def generate(model: torch.nn.Module, tokenizer: object, prompt: torch.Tensor, name: str) -> None:
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, return_dict_in_generate=True
    )
    answer = tokenizer.decode(out.sequences[0, prompt.shape[1] :]).splitlines()[0].strip()
    cache = out.past_key_values
    held = cache.nbytes if isinstance(cache, MoACache) else sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    print(f"{name:>14}: {answer!r}, KV cache {held / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
