from __future__ import annotations

import pytest

from moa_search.formats import ModelSignature, Plan
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
