from __future__ import annotations

import pandas as pd
import pytest

from moa_search.formats import ModelSignature, Plan
from moa_search.inspection.pages import Report
from moa_search.spans import DENSE, SpanRule

SIZES = {"one head": (1, 1), "as for 70B": (80, 8), "without GQA": (3, 32), "uneven": (2, 12)}


def make_plan(layers: int, heads: int) -> Plan:
    """Spans that tell every layer and head apart; the last head is dense."""
    model = ModelSignature(
        architecture="llama",
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        config={"max_position_embeddings": 8192},
    )
    rules = [[SpanRule(1000 + 40 * layer + head, 0) for head in range(heads - 1)] + [DENSE] for layer in range(layers)]
    return Plan.from_rules(rules, model)


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def sized_plan(request: pytest.FixtureRequest) -> Plan:
    return make_plan(*request.param)


@pytest.fixture
def uneven_plan() -> Plan:
    return make_plan(*SIZES["uneven"])


@pytest.fixture
def small_report(tiny_plan):
    """Two plans and uniform spans beside dense: passkeys at three depths, documents in slices, one multiple unknown."""
    from moa_search.evaluation import paired_differences, summarise
    from moa_search.evaluation.effective import effective_table

    names = ["dense", "uniform like exact @ 0.5", "exact @ 0.5", "a <plan> of mine"]
    rows = [
        {"task": task, "length": length, "variant": name, "density": 1 - 0.2 * place, "attention_density": 1.0,
         "metric": metric, "answers": "forced", "item": item if task == "passkey" else item // 3, "depth": item % 3 / 2,
         "nll": 0.5 + place, "score": float(item >= place * step)}
        for task, metric in (("passkey", "exact match"), ("perplexity", "token accuracy"))
        for step, length in enumerate((512, 1024)) for place, name in enumerate(names) for item in range(6)
    ]  # fmt: skip
    items = pd.DataFrame(rows)
    uniform = dict.fromkeys(names[2:], "uniform like exact @ 0.5")
    effective = effective_table(items, ["passkey"], uniform=uniform, windows={}, window_items=items[:0])
    return Report(
        settings={"model": "made & up", "answers": "teacher-forced"},
        items=items,
        summary=summarise(items),
        differences=paired_differences(items),
        effective=effective,
        plans=dict.fromkeys(names[2:], tiny_plan),
    )
