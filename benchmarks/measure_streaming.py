"""Perplexity and memory of text that goes on beyond a model's context.

    python benchmarks/measure_streaming.py PLAN.json [PLAN.json ...] --length 12288 --fixed-at 8192 2048

Held-out texts are read in chunks, each a forward pass after the last one's cache; a token's loss is from one reading.
Variants: the plain model; each plan with its spans at each of the lengths ``--fixed-at``, streaming; one window for all
heads with as much memory (StreamingLLM); and, with no cache, the plain model that reads the newest ``--again`` tokens
again for each chunk, which no position beyond the context disturbs. Prints Markdown: perplexity by slices of the text,
and the cache in MiB at the end of the context and at the end of the text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

from moa_search import MoACache, Plan, apply_plan, load_model, remove_plan
from moa_search.data.texts import documents, encode
from moa_search.modeling.text import context_length
from moa_search.spans import SpanRule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--length", type=int, default=12288, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--slice", type=int, default=2048, help="tokens, for the table")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a forward pass")
    parser.add_argument("--fixed-at", type=int, nargs="+", default=[8192, 2048], help="tokens at which spans are fixed")
    parser.add_argument("--again", type=int, default=4096, help="tokens read again for each chunk; 0 leaves it out")
    parser.add_argument("--context", type=int, default=0, help="tokens, if shorter than the model's own")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    context = options.context or context_length(model.config)
    texts = [torch.tensor(ids, device=model.device) for ids in long_texts(tokenizer, options.length, options.texts)]
    slices = range(0, options.length, options.slice)
    print(f"{len(texts)} texts of {options.length} tokens, context {context}, {model.dtype}, {model.device}\n")
    head = [f"to {start + options.slice}" for start in slices] + ["MiB at the context", "at the end"]
    print("| | " + " | ".join(head) + " |\n|---|" + "---:|" * len(head), flush=True)

    def report(name: str, readings: list[tuple[torch.Tensor, list[int]]]) -> None:
        losses = torch.stack([losses for losses, _ in readings]).mean(0)
        found = [f"{losses[start : start + options.slice].nanmean().exp():.2f}" for start in slices]
        held = readings[0][1]
        if held:
            found += [f"{held[at] / 2**20:.1f}" for at in (context // options.chunk - 1, -1)]
        else:
            found += ["", ""]
        print(f"| {name} | " + " | ".join(found) + " |", flush=True)

    report("plain", [read(model, ids, options.chunk, DynamicCache(config=model.config)) for ids in texts])
    if options.again:
        report(
            f"plain, the newest {options.again} again",
            [(read_again(model, ids, options.chunk, options.again), []) for ids in texts],
        )
    for path in options.plans:
        plan = Plan.load(path)
        for tokens in options.fixed_at:
            fixed = plan.anchored_at(tokens)
            window = SpanRule(round(plan.density(tokens) * tokens), 0)
            uniform = Plan.uniform(window, plan.model, sink=plan.sink, block=plan.block)
            for name, variant in ((f"{path} at {tokens}", fixed), (f"one window of {window.alpha}", uniform)):
                apply_plan(model, variant, streaming=context)
                report(name, [read(model, ids, options.chunk, MoACache(model.config, variant)) for ids in texts])
                remove_plan(model)


def long_texts(tokenizer: Any, length: int, count: int) -> Iterator[list[int]]:
    """Held-out texts of ``length`` tokens: modules that are as long, and others put together, in their order."""
    found, parts = 0, []
    for name, text in documents("test"):
        if name.startswith("module:"):
            parts += encode(tokenizer, text).tolist()
            if len(parts) >= length:
                yield parts[:length]
                found, parts = found + 1, []
        if found == count:
            return
    raise SystemExit(f"this Python has {found} texts of {length} tokens")


def read(model: Any, ids: torch.Tensor, chunk: int, cache: Any) -> tuple[torch.Tensor, list[int]]:
    """Loss of each token ``[tokens]``, the first's NaN, and the cache's bytes after every chunk."""
    losses, held = [torch.full((1,), torch.nan)], []
    for start in range(0, len(ids), chunk):
        logits = model(ids[None, start : start + chunk], past_key_values=cache, use_cache=True).logits[0]
        following = ids[start + 1 : start + chunk + 1]
        losses.append(torch.nn.functional.cross_entropy(logits[: len(following)].float(), following, reduction="none"))
        held.append(cache.nbytes if isinstance(cache, MoACache) else bytes_of(cache))
    return torch.cat([part.cpu() for part in losses]), held


def read_again(model: Any, ids: torch.Tensor, chunk: int, newest: int) -> torch.Tensor:
    """Loss of each token ``[tokens]`` where a chunk is read together with the tokens before it, ``newest`` in all."""
    losses = [torch.full((1,), torch.nan)]
    for end in range(chunk, len(ids) + 1, chunk):
        begin, known = max(0, end - newest), end - chunk
        logits = model(ids[None, begin:end], use_cache=False).logits[0, known - begin :]
        following = ids[known + 1 : end + 1]
        losses.append(torch.nn.functional.cross_entropy(logits[: len(following)].float(), following, reduction="none"))
    return torch.cat([part.cpu() for part in losses])


def bytes_of(cache: DynamicCache) -> int:
    """Bytes of a dense cache's keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    main()
