"""A decoding step's attention on a CPU, codes beside 16 bits of equal spans and dense SDPA: one process, one thread.

    OMP_NUM_THREADS=1 python benchmarks/measure_codes.py PLAN.json 4096

All layers' storing and attention, without the model; caches hold random bytes. CPU time, the least of several.
"""

from __future__ import annotations

import sys
import time

import torch
from moa_kernels.append import append_tokens
from moa_kernels.coded import append_codes, decode_codes
from moa_kernels.decode import span_decode

from moa_search.formats import Plan
from moa_search.runtime.rules import rules_of

DTYPE = torch.bfloat16


def main(path: str, tokens: int) -> None:
    torch.set_num_threads(1)
    plan = Plan.load(path)
    heads, width, layers = plan.model.num_key_value_heads, plan.model.head_dim, plan.model.num_hidden_layers
    group = plan.model.num_attention_heads // heads
    query, new = (torch.randn(1, n, 1, width).to(DTYPE) for n in (group * heads, heads))
    lens, cases = torch.tensor([tokens + 1]), []
    for rules in rules_of(plan, [None] * layers):
        rings = rules.layout(rules.capacities(tokens + 1))
        plain = [torch.randn(1, rings.slots, width).to(DTYPE) for _ in range(2)]
        layout = stored = None
        if rules.codecs is not None:
            layout = rules.codecs.layout(rings, DTYPE.itemsize)
            stored = layout.empty(1, DTYPE, torch.device("cpu"))
            for part in stored[:2]:
                part.random_(0, 256)
            for part in stored[2:]:
                part.normal_(0.5, 0.1)
        cases.append((rules, rings, plain, layout, stored))
    dense = [torch.randn(1, heads, tokens + 1, width).to(DTYPE) for _ in range(2)]

    def in_16_bits(rules, rings, plain) -> None:
        append_tokens(*plain, new, new, lens - 1, rings, impl="cpu")
        span_decode(query, *plain, lens, rings, rules.head_spans, impl="cpu")

    def all_plain() -> None:
        for rules, rings, plain, *_ in cases:
            in_16_bits(rules, rings, plain)

    def all_coded() -> None:
        for rules, rings, plain, layout, stored in cases:
            if stored is None:
                in_16_bits(rules, rings, plain)
                continue
            turns = rules.codecs.turns
            append_codes(new, new, stored, lens - 1, layout, turns, impl="cpu")
            decode_codes(query, stored, lens, layout, turns, rules.head_spans, impl="cpu")

    def all_dense() -> None:
        for _ in cases:
            torch.nn.functional.scaled_dot_product_attention(query, *dense, enable_gqa=True)

    best = dict.fromkeys((all_coded, all_plain, all_dense), float("inf"))
    for _ in range(6):
        for step in best:
            start = time.thread_time()
            step()
            best[step] = min(best[step], time.thread_time() - start)
    print({step.__name__: f"{1000 * seconds:.1f} ms" for step, seconds in best.items()}, f"torch {torch.__version__}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(sys.argv[1], int(sys.argv[2]))
