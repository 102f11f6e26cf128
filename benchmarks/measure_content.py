"""Would heads with short rules gain from keeping keys by content, at equal bytes?

    python benchmarks/measure_content.py PLAN.json [PLAN.json ...] --output scores.csv [--tasks passkey copy]

A context (an item before its question) is read with every key and value as the plan's codes give them back; the scores
of its keys come from its own queries, keys and values, before those are coded. What follows the context (question and
answer, teacher-forced) attends, in a head whose rule keeps B < n of the context's n tokens: the sink, ``c`` keys of the
context that a score prefers among those outside the window, and the newest ``span(i + 1) - sink - c`` tokens: as many
as under the plan, at every position. c is ``floor(share * (B - sink - block))``: share 0 is the plan, share 1 leaves a
window of one block. Within the context heads attend by the plan's rule, or with ``--reading whole`` everything before
them, as eviction methods do, which read a prompt densely and compress what they keep.

Scores: `keydiff` (arXiv 2504.15364), `expected` attention (2510.00636), `leverage` of keys before rotary embedding,
`compactor` (2507.08143: leverage, and attention within chunks of 256 that isn't causal), `kvzip` (2505.23416: the
largest weight that a repetition of the context gives; reads it again), `oracle` (the largest weight that question and
answer give: a bound, no method). Explicit masks; nothing is freed. For Llama's attention: rotary embedding of pairs
half a head apart. Rows are added to the CSV cell by cell; a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from moa_kernels.codes import Codec, Transform
from torch import Tensor
from torch.nn.functional import (
    avg_pool1d,
    cosine_similarity,
    cross_entropy,
    normalize,
    pad,
    scaled_dot_product_attention,
)

from moa_search import Plan, load_model
from moa_search.modeling.attention import swapped
from moa_search.tasks import require_tasks

NAME = "content"
REPEAT = "\n\nRepeat the previous context exactly."
COLUMNS = ("plan", "task", "length", "seed", "reading", "content", "share", "item", "nll", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="CSV")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", nargs="+", default=["passkey", "copy", "multikey", "lines", "question"])
    parser.add_argument("--length", type=int, default=1024, help="tokens")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=40, help="items at once")
    parser.add_argument("--reading", choices=["plan", "whole"], default="plan")
    parser.add_argument("--scores", nargs="+", default=SCORES, choices=SCORES)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0])
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = load_model(options.model)
    done = set()
    if options.output.exists():
        with options.output.open(newline="") as stream:
            done = {tuple(row[name] for name in COLUMNS[:5]) for row in csv.DictReader(stream)}
    for path, task in product(options.plans, require_tasks(options.tasks)):
        cell = (path.stem, task.name, str(options.length), str(options.seed), options.reading)
        if cell in done:
            continue
        samples = task.held_out(tokenizer, length=options.length, count=options.samples, seed=options.seed)
        passes = Passes(model, tokenizer.encode(REPEAT, add_special_tokens=False), Plan.load(path), options)
        rows = []
        with swapped(model, NAME, passes.attention, lambda *args, **kwargs: None):
            for start in range(0, len(samples), options.batch):
                rows += passes.measure(task, samples[start : start + options.batch], start)
        new = not options.output.exists()
        with options.output.open("a", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerows([COLUMNS] * new + [(*cell, *row) for row in rows])
        for variant in dict.fromkeys(row[:2] for row in rows):
            mine = [row for row in rows if row[:2] == variant]
            nll, score = (sum(row[at] for row in mine) / len(mine) for at in (3, 4))
            print(*cell, *variant, f"{nll:.3f} / {score:.2f}", flush=True)


class Passes:
    """One plan's forward passes over a batch of items, and what is kept between them.

    Args:
        model: Dense.
        repeat: Token ids that ask for a repetition.
        plan: Its rules and codes are applied here.
        options: Of the command.
    """

    def __init__(self, model: Any, repeat: list[int], plan: Plan, options: argparse.Namespace) -> None:
        self.model, self.options, self.plan, self.device = model, options, plan, model.device
        self.repeat = torch.tensor(repeat, device=self.device)
        self.layers, self.kv_heads = plan.model.num_hidden_layers, plan.model.num_key_value_heads
        self.group = plan.model.num_attention_heads // self.kv_heads
        self.frequencies = model.model.rotary_emb.inv_freq.double()
        rules = [[(rule.alpha, rule.beta_256) for rule in layer] for layer in plan.rules]
        self.rules = torch.tensor(rules, device=self.device)  # [layer, kv_head, 2]
        self.codecs = [[self.codecs_of(layer, side) for side in range(2)] for layer in range(self.layers)]

    def codecs_of(self, layer: int, side: int) -> list[tuple[list[int], Codec]]:
        """The layer's heads by bits of their keys (side 0) or values (1), 16 aside."""
        found = []
        for bits in sorted({tier[side] for tier in self.plan.tiers[layer]} - {16}):
            heads = [head for head, tier in enumerate(self.plan.tiers[layer]) if tier[side] == bits]
            transform = None
            if bits < 8 and side == 1:
                transform = Transform.rotation(len(heads), self.plan.model.head_dim)
            elif bits < 8:
                assert self.plan.key_transforms is not None
                arrays = {name: torch.from_numpy(one) for name, one in self.plan.key_transforms.layer(layer).items()}
                transform = Transform.of_keys(**arrays, bits=bits).of(heads)
            found.append((heads, Codec(bits, None if transform is None else transform.to(self.device))))
        return found

    def measure(self, task: Any, samples: list[Any], first: int) -> list[tuple[str, float, int, float, float]]:
        """Score, share, item, NLL and the task's score of every variant and sample."""
        ids = torch.stack([torch.from_numpy(sample.ids) for sample in samples]).to(self.device)
        answers = [sample.answer_tokens for sample in samples]
        self.length = ids.shape[1]
        self.ends = torch.tensor(  # [batch], tokens of the context
            [self.length - sample.question_tokens - sample.answer_tokens for sample in samples], device=self.device
        )
        self.in_context = torch.arange(self.length, device=self.device) < self.ends[:, None]  # [batch, length]
        self.tail = int(self.length - self.ends.min())
        self.states: list[Any] = [None] * self.layers  # keys and values of all positions, as they are seen
        self.scores: dict[tuple[str, int], Tensor] = {}
        at = torch.arange(self.length - self.tail, self.length, device=self.device)[None]
        self.forward("context", input_ids=ids)
        if "kvzip" in self.options.scores:
            again = torch.cat([self.repeat.expand(len(ids), -1), ids[:, : int(self.ends.max())]], 1)
            positions = self.ends[:, None] + torch.arange(again.shape[1], device=self.device)
            self.forward("kvzip", input_ids=again, position_ids=positions)
        if "oracle" in self.options.scores:
            self.forward("oracle", input_ids=ids[:, -self.tail :], position_ids=at)
        rows, most = [], max(answers)
        for kind, share in [("none", 0.0), *product(self.options.scores, self.options.shares)]:
            self.kind, self.share = kind, share
            logits = self.forward("tail", most + 1, input_ids=ids[:, -self.tail :], position_ids=at)[:, :-1].float()
            losses = cross_entropy(logits.mT, ids[:, -most:], reduction="none")
            right = logits.argmax(-1) == ids[:, -most:]
            for number, count in enumerate(answers):
                nll = losses[number, -count:].double().mean().item()
                score = task.score(right[number, -count:].cpu().numpy())
                rows.append((kind, share, first + number, round(nll, 5), round(score, 4)))
        return rows

    def forward(self, phase: str, keep: int = 1, **inputs: Tensor) -> Tensor:
        """Logits of the last ``keep`` tokens in a pass of its own kind."""
        self.phase = phase
        logits: Tensor = self.model(use_cache=False, logits_to_keep=keep, **inputs).logits
        return logits

    def seen(self, layer: int, states: Tensor, side: int, first: int) -> Tensor:
        """Keys (side 0) or values (1) from position ``first`` on as codes give them back."""
        found = states.clone()
        positions = torch.arange(first, first + states.shape[2], device=states.device)
        for heads, codec in self.codecs[layer][side]:
            found[:, heads] = codec.seen(states[:, heads], positions, self.plan.sink)
        return found

    def span(self, layer: int, n):
        """Tokens that heads keep at context length ``n`` ``[...]``: ``[..., kv_heads]``."""
        alpha, beta = self.rules[layer].unbind(-1)
        n = n[..., None]
        return (alpha + ((beta * n) >> 8)).clip(self.plan.min_span).minimum(n)

    def attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        out = getattr(self, f"_{self.phase}")(module.layer_idx, query, key, value, scaling)
        return out.transpose(1, 2), None

    def _context(self, layer, query, key, value, scaling):
        seen = [self.seen(layer, states, side, 0) for side, states in enumerate((key, value))]
        self.states[layer] = seen
        key_all, value_all = (states.repeat_interleave(self.group, 1) for states in seen)
        if self.options.reading == "whole":
            out = scaled_dot_product_attention(query, key_all, value_all, is_causal=True, scale=scaling)
        else:
            at = torch.arange(self.length, device=query.device)
            window = self.span(layer, at + 1) - self.plan.sink  # [query, kv_head]
            start = (at[:, None] + 1 - window).T[..., None]  # [kv_head, query, 1]
            mask = (at <= at[:, None]) & ((at < self.plan.sink) | (at >= start))
            mask = mask.repeat_interleave(self.group, 0)[None].expand(len(query), -1, -1, -1)
            out = scaled_dot_product_attention(query, key_all, value_all, attn_mask=mask, scale=scaling)
        if self.is_short(layer):
            for name in set(CHEAP) & set(self.options.scores):
                self.keep_score(name, layer, CHEAP[name](self, layer, query.float(), key.float(), value.float()))
        return out

    def is_short(self, layer: int) -> bool:
        """Whether some head of it doesn't keep the whole context."""
        return bool((self.span(layer, self.ends) < self.ends[:, None]).any())

    def keep_score(self, name: str, layer: int, score: Tensor) -> None:
        """``score`` ``[batch, kv_heads, length]``; positions after the context don't count."""
        self.scores[name, layer] = score.masked_fill(~self.in_context[:, None], -torch.inf)

    def grouped(self, query):
        """``[batch, kv_heads, group * rows, head_dim]``."""
        return query.unflatten(1, (self.kv_heads, self.group)).flatten(2, 3)

    def _kvzip(self, layer, query, key, value, scaling):
        batch, _, rows, _ = query.shape
        old_key, old_value = self.states[layer]
        old = self.length
        at = torch.arange(old, device=query.device)
        own = torch.arange(rows, device=query.device)
        valid = (at < self.ends[:, None])[:, None].expand(-1, rows, -1)  # [batch, rows, old]
        mask = torch.cat([valid, (own <= own[:, None]).expand(batch, -1, -1)], -1)[:, None]
        keys, values = torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)
        out = scaled_dot_product_attention(
            query,
            keys.repeat_interleave(self.group, 1),
            values.repeat_interleave(self.group, 1),
            attn_mask=mask.expand(-1, query.shape[1], -1, -1),
            scale=scaling,
        )
        if self.is_short(layer):
            score = query.new_full((batch, self.kv_heads, self.length), -torch.inf, dtype=torch.float32)
            # Rows that repeat nothing: the request before, and what fills up shorter contexts.
            repeats = (own >= len(self.repeat)) & (own < len(self.repeat) + self.ends[:, None])
            for item in range(batch):
                logits = self.grouped(query[item : item + 1]).float() @ keys[item : item + 1].float().mT * scaling
                hidden = ~mask[item].repeat(1, self.group, 1)
                weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., :old]
                weights = weights.masked_fill(~repeats[item].repeat(self.group)[:, None], 0)
                score[item, :, :old] = weights.amax(2)[0]
            self.keep_score("kvzip", layer, score)
        return out

    def _oracle(self, layer, query, key, value, scaling):
        keys, values = self.with_tail(layer, key, value)
        at = torch.arange(self.length, device=query.device)
        rows = at[-self.tail :]
        causal = at <= rows[:, None]
        logits = self.grouped(query).float() @ keys.float().mT * scaling
        weights = logits.masked_fill(~causal.repeat(self.group, 1), -torch.inf).softmax(-1)
        asks = rows >= self.ends[:, None]  # [batch, tail]
        asked = weights.masked_fill(~asks.repeat(1, self.group)[:, None, :, None], 0)
        self.keep_score("oracle", layer, asked.amax(2))
        out = weights.to(values.dtype) @ values
        return out.unflatten(2, (self.group, self.tail)).flatten(1, 2)

    def with_tail(self, layer, key, value):
        first = self.length - self.tail
        seen = [self.seen(layer, states, side, first) for side, states in enumerate((key, value))]
        return [torch.cat([old[:, :, :first], new], 2) for old, new in zip(self.states[layer], seen, strict=True)]

    def _tail(self, layer, query, key, value, scaling):
        keys, values = self.with_tail(layer, key, value)
        mask = self.tail_mask(layer).repeat(1, 1, self.group, 1)  # [batch, kv_heads, group * tail, length]
        out = scaled_dot_product_attention(self.grouped(query), keys, values, attn_mask=mask, scale=scaling)
        return out.unflatten(2, (self.group, self.tail)).flatten(1, 2)

    def tail_mask(self, layer):
        """Boolean ``[batch, kv_heads, tail, length]``."""
        at = torch.arange(self.length, device=self.ends.device)
        rows = at[-self.tail :]
        causal = at <= rows[:, None]  # [tail, length]
        asks = rows >= self.ends[:, None]  # [batch, tail]
        kept = self.span(layer, self.ends)  # [batch, kv_heads], at the context's end
        chosen_count = ((kept - self.plan.min_span).clip(0).double() * self.share).floor().long()
        chosen_count = torch.where(kept < self.ends[:, None], chosen_count, 0)
        window = (self.span(layer, rows + 1) - self.plan.sink).T  # [kv_heads, tail]
        window = window - chosen_count[..., None] * asks[:, None]  # [batch, kv_heads, tail]
        start = rows + 1 - window
        mask = (at < self.plan.sink) | (at >= start[..., None])
        if self.share and bool(chosen_count.any()):
            # Of the context's tokens outside the window at its end
            end = self.ends[:, None] - (kept - self.plan.sink - chosen_count)  # [batch, kv_heads]
            candidate = (at >= self.plan.sink) & (at < end[..., None])
            score = self.scores[self.kind, layer].masked_fill(~candidate, -torch.inf)
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            chosen = (rank < chosen_count[..., None]) & candidate
            assert bool((chosen.sum(-1) == chosen_count).all())
            mask = mask | (chosen[:, :, None] & asks[:, None, :, None])
        if self.options.reading == "whole":
            mask = mask | ~asks[:, None, :, None]
        mask = mask & causal
        held = self.span(layer, rows + 1).T.expand(len(self.ends), -1, -1)
        assert bool(((mask.sum(-1) == held) | ~asks[:, None]).all()), "as many tokens as under the plan"
        return mask


# Each of queries [batch, heads, length, head_dim], keys and values [batch, kv_heads, length, head_dim], float32:
# [batch, kv_heads, length], from the context's positions only.


def keydiff(passes: Passes, layer, query, key, value):
    inside = passes.in_context[:, None, :, None]
    unit = normalize(key, dim=-1)
    anchor = (unit * inside).sum(2, keepdim=True) / inside.sum(2, keepdim=True)
    return -cosine_similarity(key, anchor, dim=-1)


def turned_back(passes: Passes, states):
    """Before rotary embedding."""
    at = torch.arange(states.shape[2], device=states.device).double()
    angles = at[:, None] * passes.frequencies
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = states.chunk(2, -1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


def leverage(passes: Passes, layer, query, key, value):
    inside = passes.in_context[:, None, :, None] & (torch.arange(key.shape[2], device=key.device) >= 8)[:, None]
    x = turned_back(passes, key).double()
    mean = (x * inside).sum(2, keepdim=True) / inside.sum(2, keepdim=True)
    x = (x - mean) * inside
    gram = x.mT @ x
    ridge = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    gram = gram + ridge[..., None, None] * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return (x * torch.cholesky_solve(x.mT, torch.linalg.cholesky(gram)).mT).sum(-1).float()


def z_normed(passes: Passes, score):
    """Over heads and positions of each item."""
    inside = passes.in_context[:, None].expand_as(score)
    count = inside.sum((1, 2), keepdim=True)
    mean = (score * inside).sum((1, 2), keepdim=True) / count
    variance = ((score - mean).square() * inside).sum((1, 2), keepdim=True) / count
    return (score - mean) / variance.sqrt().clamp_min(1e-6)


def compactor(passes: Passes, layer, query, key, value, chunk: int = 256):
    lead = 8  # tokens at the start that neither attend nor are attended
    batch, _, length, _ = query.shape
    padded = -(-(length - lead) // chunk) * chunk
    fill = (0, 0, 0, padded - (length - lead))
    inside = pad(passes.in_context[:, lead:], fill[2:])  # [batch, padded]
    inside = inside.unflatten(1, (-1, chunk))[:, None, None]  # [batch, 1, 1, chunks, chunk]
    q = pad(query[:, :, lead:], fill).unflatten(2, (-1, chunk))
    q = q.unflatten(1, (passes.kv_heads, passes.group))
    k = pad(key[:, :, lead:], fill).unflatten(2, (-1, chunk))[:, :, None]
    score = key.new_zeros(batch, passes.kv_heads, padded)
    for item in range(batch):
        # As kvpress computes it: logits aren't divided by the root of the width.
        logits = (q[item] @ k[item].mT).masked_fill(~inside[item, ..., None, :], -1e30)
        weights = logits.softmax(-1) * inside[item, ..., None]
        score[item] = weights.sum(-2).mean(1).flatten(1)
    attended = pad(score[..., : length - lead], (lead, 0)) * value.norm(dim=-1)
    attended = attended * passes.in_context[:, None]
    attended = avg_pool1d(attended, kernel_size=3, padding=1, stride=1)
    blending = 1 - passes.span(layer, passes.ends) / passes.ends[:, None]  # [batch, kv_heads]: what isn't kept
    return blending[..., None] * z_normed(passes, leverage(passes, layer, query, key, value)) + z_normed(
        passes, attended
    )


def expected(passes: Passes, layer, query, key, value, future: int = 512):
    width = query.shape[-1]
    skip = (torch.arange(query.shape[2], device=query.device) >= 4)[:, None]
    inside = passes.in_context[:, None, :, None] & skip
    before = turned_back(passes, query)
    count = inside.sum(2, keepdim=True)
    mean = (before * inside).sum(2, keepdim=True) / count
    centred = (before - mean) * inside
    spread = centred.mT @ centred / count  # [batch, heads, width, width]
    at = passes.ends[:, None].double() + torch.arange(future, device=query.device)
    angles = at[..., None] * passes.frequencies
    cos, sin = angles.cos().mean(1).float(), angles.sin().mean(1).float()  # [batch, width / 2]
    turn = torch.cat(
        [
            torch.cat([torch.diag_embed(cos), torch.diag_embed(-sin)], -1),
            torch.cat([torch.diag_embed(sin), torch.diag_embed(cos)], -1),
        ],
        -2,
    )[:, None]  # a turned column vector is turn @ x
    mean = mean @ turn.mT  # [batch, heads, 1, width]
    spread = turn @ spread @ turn.mT
    keys = key.repeat_interleave(passes.group, 1)
    scores = (keys @ mean.mT)[..., 0] / width**0.5 + ((keys @ spread) * keys).sum(-1) / width / 2
    scores = scores.masked_fill(~inside[..., 0], -torch.inf).softmax(-1)
    scores = scores.unflatten(1, (passes.kv_heads, passes.group)).mean(2)
    return scores * value.norm(dim=-1)


CHEAP: dict[str, Callable[..., Tensor]] = {
    "keydiff": keydiff,
    "leverage": leverage,
    "compactor": compactor,
    "expected": expected,
}
SCORES = [*CHEAP, "kvzip", "oracle"]


if __name__ == "__main__":
    main()
