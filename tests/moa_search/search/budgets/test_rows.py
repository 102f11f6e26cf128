"""Every row promises exactly what the user asked for, in the user's unit."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.formats.plan import Plan
from moa_search.formats.profile_content import LengthHeader, ProfileHeader
from moa_search.formats.provenance import Budget
from moa_search.formats.signature import ModelSignature
from moa_search.search.budgets.cost_model import CostModel
from moa_search.search.budgets.hardware import Hardware
from moa_search.search.budgets.rows import budget_rows, used
from moa_search.search.budgets.specs import BudgetSpec
from moa_search.spans import DENSE, SpanRule

RULES = [SpanRule(48, 0), SpanRule(200, 0), SpanRule(0, 64), SpanRule(-64, 128), DENSE]
DEVICE = Hardware(name="toy", bandwidth_bytes_per_s=3e9, flops_per_s=7e11, tile_query=32, tile_key=16)
LAYERS, KV_HEADS, NATIVE = 5, 2, (1, 3)
WEIGHTS = 1_234_568


def header_of(native=NATIVE):
    model = ModelSignature(
        architecture="qwen2",
        num_hidden_layers=LAYERS,
        num_attention_heads=4 * KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=64,
        config={"sliding_window": 100} if native else {},
    )
    length = LengthHeader(length=512, windows=(32, 512), row_buckets=1, samples=1)
    fields = {"model_name": "x", "dtype": "float32", "sink": 16, "block": 32, "seed": 0, "native_layers": native}
    return ProfileHeader(model=model, lengths=(length,), **fields)


HEADER = header_of()
HEADS = (LAYERS - len(NATIVE)) * KV_HEADS


def rows_of(*texts, rules=RULES, header=HEADER, **options):
    return budget_rows(texts, rules, header, **({"hardware": DEVICE, "weights_bytes": WEIGHTS} | options))


def plan_of(choice):
    heads = iter(choice)
    rules = [[DENSE if layer in NATIVE else RULES[next(heads)] for _ in range(KV_HEADS)] for layer in range(LAYERS)]
    return Plan.from_rules(rules, HEADER.model, native_layers=NATIVE)


def amount_of(kind, choice, length, batch, anchor="position"):
    """What a plan uses, worked out from the plan or head by head: share, tokens, bytes or seconds."""
    plan = plan_of(choice)
    spans = [tokens for layer, heads in enumerate(plan.spans(length)) for tokens in heads if layer not in NATIVE]
    if kind in ("density", "tokens"):
        return Fraction(sum(spans), HEADS * (length if kind == "density" else 1))
    if kind in ("kv", "memory"):
        return plan.kv_bytes(length, batch=batch) + (WEIGHTS if kind == "memory" else 0)
    cost = CostModel(DEVICE, HEADER.model)
    native = len(NATIVE) * KV_HEADS
    if kind == "decode":
        heads = sum(cost.decode_ps(tokens, batch=batch) for tokens in spans)
        constant = cost.weights_ps(WEIGHTS, batch) + native * cost.decode_ps(min(length, 100), batch=batch)
        return (heads + constant) / 10**12
    at_prompt = {"sink": 16, "min_span": 48, "batch": batch}
    rules = [RULES[rule] if anchor == "position" else SpanRule(n, 0) for rule, n in zip(choice, spans, strict=True)]
    heads = sum(cost.prefill_ps(rule, length, **at_prompt) for rule in rules)
    window = cost.prefill_ps(SpanRule(100, 0), length, sink=0, min_span=1, batch=batch)
    return (heads + cost.weights_ps(WEIGHTS, batch * length) + native * window) / 10**12


UNITS = {
    "density": {"": 1},
    "tokens": {"": 1},
    "kv": {"B": 1, "KiB": 1024, "MB": 10**6, "GiB": 2**30},
    "memory": {"B": 1, "KB": 1000, "MiB": 2**20},
    "decode": {"us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": 1},
    "prefill": {"us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": 1},
}
choices = st.lists(st.integers(0, len(RULES) - 1), min_size=HEADS, max_size=HEADS)


@st.composite
def asked(draw):
    """A kind, a unit, a place, and a choice of rules whose use decides what is asked, almost to the last digit."""
    kind = draw(st.sampled_from(sorted(UNITS)))
    unit = draw(st.sampled_from(sorted(UNITS[kind])))
    length = draw(st.integers(1, 700))
    batch = 1 if kind in ("density", "tokens") else draw(st.integers(1, 9))
    anchor = draw(st.sampled_from(["position", "prompt"]))
    choice = draw(choices)
    near = Fraction(amount_of(kind, choice, length, batch, anchor)) / UNITS[kind][unit]
    digits = draw(st.integers(0, 12))
    number = Fraction(math.floor(near * 10**digits) + draw(st.integers(0, 1)), 10**digits)
    if kind == "density":
        number = min(number, Fraction(1))
    whole, part = divmod(number.numerator * 10**digits // number.denominator, 10**digits)
    text = (
        f"{kind}={whole}.{part:0{digits}d}{unit}@{length}x{batch}"
        if digits
        else f"{kind}={whole}{unit}@{length}x{batch}"
    )
    return kind, number, number * UNITS[kind][unit], text.removesuffix("x1"), length, batch, anchor, choice


@given(asked(), st.lists(choices, max_size=5))
def test_the_integers_keep_exactly_what_was_asked(case, tried):
    kind, number, amount, text, length, batch, anchor, near = case
    assume(number)
    try:
        (row,) = rows_of(text, anchor=anchor)
    except BudgetInfeasibleError:
        cheapest = min(amount_of(kind, [rule] * HEADS, length, batch, anchor) for rule in range(len(RULES)))
        assert cheapest > amount
        return
    assert row.costs.dtype == np.int64
    for choice in [near, *tried]:
        kept = int(row.costs[choice].sum()) <= row.limit
        assert kept == (amount_of(kind, choice, length, batch, anchor) <= amount)


@given(asked())
def test_the_smallest_value_named_is_feasible_and_hardly_more_than_needed(case):
    kind, number, _, text, length, batch, anchor, _ = case
    assume(number)
    with pytest.raises(BudgetInfeasibleError) as refused:
        rows_of(re.sub(r"=[0-9.]+", "=0.000000001", text), anchor=anchor)
    value = re.search(r"already take ([^ ]+)", str(refused.value))[1]
    (row,) = rows_of(f"{kind}={value}{text[text.index('@') :]}", anchor=anchor)
    cheapest = min(amount_of(kind, [rule] * HEADS, length, batch, anchor) for rule in range(len(RULES)))
    assert cheapest <= row.spec.amount / (10**12 if kind in ("decode", "prefill") else 1) <= cheapest * 1.001 + 1e-15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "density=0.04@1000",
            "density=0.04@1000 can't be met: the smallest spans already take 0.048",
        ),
        ("tokens=47.9@512", "tokens=47.9@512 can't be met: the smallest spans already take 48"),
        # (6 heads of 48 tokens and 4 native ones of 100) of 256 bytes, 8 times
        (
            "kv=1MiB@32768x8",
            "kv=1MiB@32768x8 can't be met: the smallest spans already take 1.344MiB (0.7812MiB whatever the plan)",
        ),
        (
            "memory=1mb@512",
            "memory=1mb@512 can't be met: the smallest spans already take 1.411MB (1.336MB whatever the plan)",
        ),
        ("decode=1us@512", "decode=1us@512 can't be met: the smallest spans already take "),
        ("prefill = .5 ms @ 1k x 2", "prefill = .5 ms @ 1k x 2 can't be met: the smallest spans already take "),
    ],
)
def test_a_budget_that_cannot_be_met_is_named_with_the_least_that_can(text, message):
    with pytest.raises(BudgetInfeasibleError, match=re.escape(message)):
        rows_of("density=1@64", text)


def test_kinds_mix_in_their_order():
    texts = ["kv=0.5MiB@512", "density=.5@512", "tokens=300@1k", "decode=5ms@512x2", "prefill=1s@512", "memory=2GB@512"]
    rows = rows_of(*texts)
    assert [row.spec.text for row in rows] == texts
    tokens = 2**19 // 256 - 4 * 100
    assert [row.budget for row in rows] == [
        Budget(length=512, density=tokens / (6 * 512), asked=texts[0]),
        Budget(length=512, density=0.5),
        Budget(length=1024, density=300 / 1024, asked=texts[2]),
        Budget(length=512, asked=texts[3], hardware="toy"),
        Budget(length=512, asked=texts[4], hardware="toy"),
        Budget(length=512, density=1, asked=texts[5]),
    ]
    assert rows[0].limit == tokens
    assert rows[0].costs.tolist() == rows[1].costs.tolist() == [48, 200, 128, 192, 512]


def test_without_native_layers_all_heads_share_the_budget():
    (row,) = rows_of("kv=1MiB@512", header=header_of(native=()))
    assert (row.limit, row.fixed) == (2**20 // 256, 0)


def test_elements_of_one_byte_make_room_for_twice_the_tokens():
    two, one = (rows_of("kv=1MiB@2k", bytes_per_element=size)[0] for size in (2, 1))
    assert one.limit == 2**20 // 128 - 400 == two.limit + 2**20 // 256


@pytest.mark.parametrize("text", ["tokens=9999@512", "kv=999999999999TiB@512", "memory=1TB@512", "prefill=99999s@512"])
def test_more_than_dense_is_allowed_and_binds_nothing(text):
    (row,) = rows_of(text)
    assert row.limit == HEADS * row.costs[-1] == HEADS * row.costs.max()
    assert row.budget.density in (1, None)


@pytest.mark.parametrize(
    ("text", "most", "least"),
    [
        ("density=1@512", "1", "0.09375"),
        ("tokens=512@512", "512", "48"),
        ("kv=9MiB@512", "0.8476MiB", "0.1679MiB"),
        ("memory=2MiB@512", "2.025MiB", "1.345MiB"),
    ],
)
def test_used_in_the_users_unit(text, most, least):
    (row,) = rows_of(text)
    assert used(row, np.full(HEADS, len(RULES) - 1)) == most
    assert used(row, np.zeros(HEADS, dtype=np.int64)) == least


@given(asked())
def test_what_keeps_a_budget_never_looks_as_if_it_broke_it(case):
    kind, number, amount, text, length, batch, anchor, choice = case
    assume(number and amount >= amount_of(kind, choice, length, batch, anchor))
    (row,) = rows_of(text, anchor=anchor)
    shown = BudgetSpec.parse(f"{kind}={used(row, np.array(choice))}@512")
    assert 0 < shown.amount <= row.spec.amount


def test_a_density_from_a_float_means_its_decimals():
    """0.57 * 100 is 56.99999999999999 in floating point, but 57 tokens may stay."""
    (row,) = rows_of(BudgetSpec.density(0.57, 100), header=header_of(native=()))
    assert (row.limit, row.budget) == (570, Budget(length=100, density=0.57))
    assert BudgetSpec.density(np.float64(0.25), 2048).text == "density=0.25@2048"


@pytest.mark.parametrize("density", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_density_out_of_range(density):
    with pytest.raises(ConfigError, match="out of range"):
        BudgetSpec.density(density, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.25", "names no kind; write one like density=0.25@2048, tokens=512@8192, kv="),
        ("", "names no kind"),
        ("densty=0.25@2k", "'densty' is no kind of budget (did you mean 'density'?); it's one of density, tokens, kv"),
        ("=0.25@2k", "'' is no kind of budget; it's one of"),
        ("kv=2GiB", "it names no length; expected a form like kv=2GiB@32768x8"),
        ("kv=2@32k", "it names no unit (B, KiB, MiB, GiB, TiB, KB, MB, GB, TB); expected a form like kv=2GiB@32768x8"),
        ("kv=2Gb/s@32k", "'2Gb/s' is no amount"),
        ("kv=2GiiB@32k", "'GiiB' is no unit (did you mean 'GiB'?); it's one of B, KiB"),
        ("kv=-2GiB@32k", "'-2GiB' is no amount"),
        ("kv=0GiB@32k", "the amount must be over 0"),
        ("kv=1e3GiB@32k", "'1e3GiB' is no amount"),
        ("kv=" + "9" * 5000 + "B@32k", "is no amount"),
        ("decode=2GiB@32k", "'GiB' is no unit; it's one of us, ms, s; expected a form like decode=12ms@32768x8"),
        ("density=25%@2k", "'25%' is no amount"),
        ("density=1.5@2k", "a density is at most 1; expected a form like density=0.25@2048"),
        ("density=nan@2k", "'nan' is no amount"),
        ("density=0.5@2kx4", "what each sample keeps doesn't depend on the batch, so name none"),
        ("tokens=64B@2k", "it takes no unit such as 'B'"),
        ("tokens=64@2m", "'2m' is no length, nor length and batch"),
        ("tokens=64@0", "the length must lie in 1..134217728 tokens"),
        ("tokens=64@999999999", "the length must lie in 1..134217728 tokens"),
        ("kv=1GiB@2kx0", "the batch must lie in 1..1048576"),
        ("kv=1GiB@2kx", "'2kx' is no length, nor length and batch"),
        ("kv=1GiB@2k\n@3k", "'2k\\n@3k' is no length, nor length and batch"),
        ("tokens=٣@2k", "'٣' is no amount"),
    ],
)
def test_wrong_texts_say_what_and_how(text, message):
    with pytest.raises(ConfigError) as caught:
        BudgetSpec.parse(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("budget '")
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30) | st.text(alphabet="kvtokens=0123456789.@xkGiBms ", max_size=25))
def test_any_text_is_a_budget_or_one_clear_error(text):
    try:
        spec, message = BudgetSpec.parse(text), ""
    except ConfigError as error:
        spec, message = None, str(error)
    assert spec is None or spec.amount > 0
    assert "\n" not in message


@pytest.mark.parametrize("again", ["kv=1GiB@2048x4", "kv = 3 mb @ 2K X 4"])
def test_one_thing_has_one_budget(again):
    with pytest.raises(ConfigError, match=re.escape(f"'{again}' repeats 'kv=1GiB@2kx4'; keep one")):
        rows_of("kv=1GiB@2kx4", "kv=1GiB@2k", again)
    same = BudgetSpec.parse("kv=1GiB@2kx4")
    with pytest.raises(ConfigError, match="repeats"):
        rows_of(same, same)


@pytest.mark.parametrize("text", ["decode=1s@512", "prefill=1s@512"])
def test_times_need_a_device(text):
    with pytest.raises(ConfigError, match=rf"'{text}' needs the speeds of a device; give hardware: one of a100-80g"):
        rows_of(text, hardware=None)


@pytest.mark.parametrize("text", ["decode=1s@512", "prefill=1s@512", "memory=1GB@512"])
def test_weights_must_be_known(text):
    with pytest.raises(ConfigError, match=rf"'{text}' needs the size of the model's weights.*give weights_bytes"):
        rows_of(text, weights_bytes=None)


def test_a_slow_device_that_would_overflow_is_told():
    snail = Hardware(name="snail", bandwidth_bytes_per_s=1e6, flops_per_s=1e6)
    with pytest.raises(ConfigError, match="more there than 64 bits can count"):
        rows_of("prefill=1s@128000k", hardware=snail)
