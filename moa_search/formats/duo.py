"""DuoAttention's attention patterns: a folder with ``full_attention_heads.tsv`` and ``config.json``.

The table holds a score per layer (line) and KV head (column): 1 for heads that need everything, 0 for heads that need
the sink and the newest tokens only. ``sink_size`` and ``recent_size`` of the configuration are those two windows in
tokens, the query itself included (mit-han-lab/duo-attention, arXiv 2410.10819).
"""

from __future__ import annotations

import json
import math

from moa_search.errors import ConfigError, ModelMismatchError, PlanFormatError
from moa_search.formats.files import one_line, parse_plan_json, sha256_of
from moa_search.formats.imported import imported
from moa_search.formats.plan import Plan
from moa_search.formats.signature import ModelSignature
from moa_search.spans import BLOCK_TOKENS, DENSE, SpanRule

DUO_FILES = ("full_attention_heads.tsv", "config.json")
"""Names in a pattern's folder: the table, and the file that holds the two sizes among much else."""

DEFAULT_THRESHOLD = 0.5


def read_duo(
    table: str | bytes,
    model: ModelSignature,
    *,
    sink: int,
    recent: int,
    threshold: float | None = None,
    sparsity: float | None = None,
    source: str,
) -> Plan:
    """A plan of dense heads and constant spans from the text of a table of scores.

    Args:
        table: ``[layer, kv_head]``, separated by tabs. Scores are first cut to 0..1.
        model: The model that the table was made for.
        sink: First tokens that every head keeps.
        recent: Newest tokens that the other heads keep.
        threshold: Heads with at least this score are dense; 0.5 if neither this nor ``sparsity`` is given.
        sparsity: Share of heads that aren't dense, those with the lowest scores: as many as lie below that quantile.
            Of equal scores, those of earlier layers and heads go first (DuoAttention draws lots).
        source: Names the table in errors.

    Raises:
        PlanFormatError: The text is no such table.
        ModelMismatchError: It has other numbers of layers or KV heads than ``model``.
        ConfigError: An option is out of range.
    """
    if threshold is not None and sparsity is not None:
        raise ConfigError("threshold and sparsity exclude each other; give one")
    if threshold is not None and not math.isfinite(threshold):
        raise ConfigError(f"threshold: {threshold} is out of range; scores lie in 0..1")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ConfigError(f"sparsity: {sparsity:g} is out of range; it must lie in 0..1")
    for name, tokens, least in (("sink", sink, 0), ("recent", recent, 1)):
        if not least <= tokens < 2**20:
            raise ConfigError(f"{name}: {tokens} tokens are out of range; it must lie in {least}..{2**20 - 1}")
    scores = _read_scores(table, model, source)
    if sparsity is None:
        bound = DEFAULT_THRESHOLD if threshold is None else threshold
        is_dense = [[score >= bound for score in layer] for layer in scores]
        how = f"dense where the score is at least {bound:g}"
    else:
        is_dense = _highest(scores, sparsity)
        how = f"sparsity {sparsity:g}"
    short = SpanRule(sink + recent, 0)
    plan = Plan.from_rules(
        [[DENSE if dense else short for dense in layer] for layer in is_dense],
        model,
        sink=sink,
        block=min(BLOCK_TOKENS, recent),
    )
    raw = table.encode() if isinstance(table, str) else table
    count = f"{sum(map(sum, is_dense))} of {model.num_hidden_layers * model.num_key_value_heads} KV heads are dense"
    notes = (
        f"DuoAttention's table, {sha256_of(raw)}",
        f"{how}: {count}, the others keep {sink} + {recent} tokens",
    )
    return imported(plan, "DuoAttention", notes, model.usual_lengths)


def read_duo_sizes(text: str | bytes, *, source: str) -> tuple[int, int]:
    """``sink_size`` and ``recent_size`` in tokens from the text of a pattern's ``config.json``.

    Raises:
        PlanFormatError: It doesn't hold them.
    """
    content = parse_plan_json(text, source)
    sizes = []
    for name in ("sink_size", "recent_size"):
        tokens = content.get(name) if isinstance(content, dict) else None
        if type(tokens) is not int:
            raise PlanFormatError(f"{source}: {name} is missing or no whole number; give sink and recent instead")
        sizes.append(tokens)
    return sizes[0], sizes[1]


def write_duo(plan: Plan) -> dict[str, str]:
    """The texts of the files of a DuoAttention pattern that says the same as ``plan``, by name.

    Raises:
        ConfigError: Some head is neither dense nor as short, at every length, as the others; the message names the
            first one.
    """
    if not plan.is_plain:
        raise _inexpressible("some heads store fewer than 16 bits")
    shared: int | None = None
    scores = []
    for layer, heads in enumerate(plan.patterns):
        for head, pattern in enumerate(heads):
            where = f"layer {layer}, KV head {head}"
            if pattern.kind == "native":
                raise _inexpressible(f"layer {layer} keeps the model's own sliding window")
            if pattern.rule.is_dense:
                continue
            if pattern.rule.beta_256:
                raise _inexpressible(f"{where}: its span grows ({pattern.rule}), and only dense heads may there")
            tokens = max(pattern.rule.alpha, plan.min_span)
            if shared is not None and tokens != shared:
                raise _inexpressible(f"{where}: it keeps {tokens} tokens, heads before it {shared}")
            shared = tokens
        scores.append([1.0 if pattern.rule.is_dense else 0.0 for pattern in heads])
    recent = plan.block if shared is None else shared - plan.sink
    table = "".join("\t".join(f"{score:.18e}" for score in layer) + "\n" for layer in scores)
    sizes = json.dumps({"sink_size": plan.sink, "recent_size": recent}) + "\n"
    return dict(zip(DUO_FILES, (table, sizes), strict=True))


def looks_like_scores(text: bytes) -> bool:
    """Whether the first line holds nothing but numbers, separated by tabs."""
    first = text.lstrip().split(b"\n", 1)[0].split(b"\t")
    return all(_number(cell.decode("utf-8", "replace")) is not None for cell in first)


def _inexpressible(reason: str) -> ConfigError:
    return ConfigError(f"the plan can't be written in DuoAttention's format: {reason}")


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _read_scores(table: str | bytes, model: ModelSignature, source: str) -> list[list[float]]:
    try:
        text = table if isinstance(table, str) else table.decode()
    except UnicodeDecodeError:
        raise PlanFormatError(f"{source}: no text, so no table of scores") from None
    lines = [line for line in text.splitlines() if line.strip()]
    scores = []
    for layer, line in enumerate(lines):
        row = []
        for head, cell in enumerate(line.split("\t")):
            score = _number(cell)
            if score is None or not math.isfinite(score):
                raise PlanFormatError(f"{source}: layer {layer}, KV head {head} is {one_line(cell)!r}, no score")
            row.append(min(max(score, 0.0), 1.0))
        scores.append(row)
    if len(scores) != model.num_hidden_layers:
        raise ModelMismatchError(f"{source}: it has {len(scores)} layers, the model {model.num_hidden_layers}")
    for layer, row in enumerate(scores):
        if len(row) != model.num_key_value_heads:
            raise ModelMismatchError(
                f"{source}: layer {layer} has {len(row)} scores, the model {model.num_key_value_heads} KV heads"
            )
    return scores


def _highest(scores: list[list[float]], sparsity: float) -> list[list[bool]]:
    """All scores but as many as lie below the quantile ``sparsity`` of that many different ones."""
    order = sorted((score, layer, head) for layer, row in enumerate(scores) for head, score in enumerate(row))
    count = len(order) if sparsity == 1 else math.ceil(sparsity * (len(order) - 1))
    short = {(layer, head) for _, layer, head in order[:count]}
    return [[(layer, head) not in short for head in range(len(row))] for layer, row in enumerate(scores)]
