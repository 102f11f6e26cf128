"""Plans whose heads store fewer than 16 bits: schema moa-plan/2 and the transforms of keys beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json

import numpy as np
import pytest
from moa_kernels import codes
from safetensors.numpy import save

from moa_search import Plan
from moa_search.errors import ConfigError, PlanFormatError, PlanVersionError
from moa_search.formats import tiers
from moa_search.formats.duo import write_duo
from moa_search.formats.moa import write_moa
from moa_search.formats.plan_content import PLAN_SCHEMAS
from moa_search.formats.transforms import KeyTransforms
from moa_search.runtime.codecs import layer_codecs
from moa_search.spans import DENSE, SpanRule
from tests.moa_search.formats.test_golden import MODEL

RULES = [[SpanRule(320, 0), DENSE], [SpanRule(64, 160), DENSE]]
MIXED = [[(4, 8), (16, 16)], [(8, 2), (3, 4)]]
WITHOUT_TRANSFORMS = [[(8, 8), (16, 4)], [(16, 16), (8, 2)]]


def transforms(seed=0, fall=None):
    """Random ones; with a spectrum that falls by a factor ``exp(fall)`` if that is given."""
    rng = np.random.default_rng(seed)
    heads, width = (MODEL.num_hidden_layers, MODEL.num_key_value_heads), MODEL.head_dim
    mean = rng.standard_normal((*heads, width)).astype(np.float32)
    balance = rng.standard_normal((*heads, width, width)).astype(np.float32)
    frequencies = rng.random((heads[0], width // 2), dtype=np.float32)
    known = KeyTransforms(mean, balance, frequencies, np.arange(width, dtype=np.int32))
    if fall is None:
        return known
    spectrum = np.broadcast_to(np.exp(-fall * np.arange(width) / width), mean.shape)
    return dataclasses.replace(known, spectrum=spectrum.astype(np.float32))


@pytest.fixture
def plan():
    return Plan.from_rules(RULES, MODEL, tiers=MIXED, transforms=transforms())


@pytest.mark.parametrize("fall", [None, 5])
def test_what_is_saved_is_read_again_with_its_transforms(fall, tmp_path):
    known = transforms(fall=fall)
    plan = Plan.from_rules(RULES, MODEL, tiers=MIXED, transforms=known)
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert read == plan
    assert read.schema_ == "moa-plan/2"
    assert read.tiers == MIXED
    assert read.rules == RULES
    tensors = read.key_transforms.tensors()
    assert tensors.keys() == known.tensors().keys()
    for name, values in known.tensors().items():
        assert np.array_equal(tensors[name], values), name
    assert read.fingerprint == plan.fingerprint


def test_a_link_to_a_plan_finds_the_transforms_beside_the_plan(plan, tmp_path):
    plan.save(tmp_path / "runs" / "plan.json")
    link = tmp_path / "best.json"
    link.symlink_to(tmp_path / "runs" / "plan.json")
    assert Plan.load(link).key_transforms == transforms()


def test_plans_of_one_profile_share_one_file(plan, tmp_path):
    plan.save(tmp_path / "a.json")
    Plan.from_rules(RULES, MODEL, tiers=[[(2, 2)] * 2] * 2, transforms=transforms()).save(tmp_path / "b.json")
    assert len(list(tmp_path.glob("transforms-*.safetensors"))) == 1


def test_sixteen_bits_everywhere_is_the_plan_it_always_was():
    stored = Plan.from_rules(RULES, MODEL, tiers=[[(16, 16)] * 2] * 2, transforms=transforms())
    assert stored.dumps() == Plan.from_rules(RULES, MODEL).dumps()
    assert "bits" not in stored.dumps()
    assert stored.schema_ == "moa-plan/1"


def test_eight_bits_and_coded_values_need_no_transforms(tmp_path):
    Plan.from_rules(RULES, MODEL, tiers=WITHOUT_TRANSFORMS, transforms=transforms()).save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert Plan.load(tmp_path / "plan.json").key_transforms is None
    with pytest.raises(ValueError, match="transforms is missing"):
        Plan.from_rules(RULES, MODEL, tiers=MIXED)


def test_another_transform_is_another_plan(plan):
    other = Plan.from_rules(RULES, MODEL, tiers=MIXED, transforms=transforms(1))
    assert other.fingerprint != plan.fingerprint
    falls = [Plan.from_rules(RULES, MODEL, tiers=MIXED, transforms=transforms(fall=fall)) for fall in (5, 6)]
    assert len({plan.fingerprint, *(other.fingerprint for other in falls)}) == 3, "a spectrum decides what is stored"
    codecs = [layer_codecs(one)[0] for one in (plan, *falls)]
    assert not any(one == two for one, two in itertools.combinations(codecs, 2))
    fewer = Plan.from_rules(RULES, MODEL, tiers=[[(4, 4), (16, 16)], MIXED[1]], transforms=transforms())
    assert fewer.fingerprint != plan.fingerprint


def spectrum(**changed):
    """One that falls, but for the first or last number of a head."""
    found = np.array(transforms(fall=5).spectrum)
    for place, value in changed.items():
        found[1, 0, {"first": 0, "last": -1}[place]] = value
    return found


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def change(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda path: path.unlink(), "can't be read (No such file or directory); keep that file beside the plan"),
        (cut, "altered since"),
        (change, "altered since"),
        (lambda path: path.write_bytes(b""), "altered since"),
    ],
)
def test_a_missing_or_altered_file_of_transforms_is_one_line(plan, tmp_path, harm, says):
    plan.save(tmp_path / "plan.json")
    harm(next(tmp_path.glob("transforms-*")))
    with pytest.raises(PlanFormatError) as error:
        Plan.load(tmp_path / "plan.json")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_transforms_of_another_model_are_refused(plan, tmp_path):
    wide = KeyTransforms(
        np.zeros((2, 2, 8), np.float32),
        np.tile(np.eye(8, dtype=np.float32), (2, 2, 1, 1)),
        np.zeros((2, 4), np.float32),
        np.arange(8, dtype=np.int32),
    )
    wide.save(tmp_path)
    content = json.loads(plan.dumps()) | {"transforms": wide.checksum}
    del content["checksum"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    says = r"no transforms of this plan's model \(tensor transforms/balance has shape \(2, 2, 8, 8\), expected"
    with pytest.raises(PlanFormatError, match=says):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": None}, "tensor transforms/mean is missing"),
        ({"means": np.zeros(1)}, "tensor transforms/means belongs to no transform"),
        ({"order": np.arange(MODEL.head_dim)}, "tensor transforms/order holds int64, expected int32"),
        ({"spectrum": spectrum(first=np.nan)}, "tensor transforms/spectrum holds values that aren't finite"),
        ({"spectrum": spectrum(first=0.5)}, "transforms/spectrum isn't positive and decreasing at layer 1, KV head 0"),
        ({"spectrum": spectrum(last=0)}, "transforms/spectrum isn't positive and decreasing at layer 1, KV head 0"),
        ({"spectrum": spectrum(last=-1)}, "transforms/spectrum isn't positive and decreasing at layer 1, KV head 0"),
        (
            {"spectrum": spectrum()[..., :-1]},
            r"tensor transforms/spectrum has shape \(2, 2, 15\), expected \(2, 2, 16\)",
        ),
        ({"spectrum": spectrum().astype(float)}, "tensor transforms/spectrum holds float64, expected float32"),
    ],
)
def test_transforms_are_all_there_and_nothing_else(change, says):
    tensors = {name: values for name, values in (transforms().tensors() | change).items() if values is not None}
    with pytest.raises(ValueError, match=says):
        KeyTransforms.of(tensors, MODEL)


@pytest.mark.parametrize(
    ("schema", "fall", "error", "says"),
    [
        ("moa-transforms/3", 5, PlanVersionError, "schema moa-transforms/3 is unknown to moa-search"),
        ("moa-transforms/1", 5, PlanFormatError, "moa-transforms/1 has no spectrum"),
        ("moa-transforms/2", None, PlanFormatError, "moa-transforms/2 needs a spectrum"),
        ("moa-profile/3", 5, PlanFormatError, 'no "schema": "moa-transforms/1"'),
        (None, None, PlanFormatError, 'no "schema": "moa-transforms/1"'),
    ],
)
def test_a_file_of_transforms_is_read_by_its_schema(plan, tmp_path, schema, fall, error, says):
    raw = save(transforms(fall=fall).tensors(), metadata=None if schema is None else {"schema": schema})
    checksum = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    (tmp_path / KeyTransforms.file_name(checksum)).write_bytes(raw)
    content = json.loads(plan.dumps()) | {"transforms": checksum}
    del content["checksum"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(error) as found:
        Plan.load(tmp_path / "plan.json")
    assert says in str(found.value)
    assert "\n" not in str(found.value)


def test_a_file_that_another_version_of_safetensors_wrote_is_kept_as_it_is(plan, tmp_path):
    raw = transforms().to_bytes()
    size = int.from_bytes(raw[:8], "little")
    raw = (size + 8).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * 8 + raw[8 + size :]  # padded once more
    checksum = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    (tmp_path / KeyTransforms.file_name(checksum)).write_bytes(raw)
    content = json.loads(plan.dumps()) | {"transforms": checksum}
    del content["checksum"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    Plan.load(tmp_path / "plan.json").save(tmp_path / "copy" / "plan.json")
    assert Plan.load(tmp_path / "copy" / "plan.json").key_transforms.to_bytes() == raw


def test_a_plan_without_its_file_says_how_to_read_it(plan, tmp_path):
    text = Plan.loads(plan.dumps())
    with pytest.raises(PlanFormatError, match=r"use Plan\.load on its file"):
        _ = text.key_transforms
    with pytest.raises(PlanFormatError, match=r"use Plan\.load on its file"):
        text.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c.update(schema="moa-plan/1"), "moa-plan/1 is for plans in which every head stores 16 bits"),
        (lambda c: c.pop("transforms"), "transforms is missing, which keys below 8 bits need"),
        (lambda c: c["patterns"][0][0].update(key_bits=5), "patterns.0.0.span.key_bits"),
        (lambda c: c["patterns"][0][0].update(key_bits="4"), "patterns.0.0.span.key_bits"),
        (lambda c: c.update(transforms="sha256:12"), "transforms: String should match pattern"),
    ],
)
def test_plans_broken_by_hand_are_one_line(plan, edit, says):
    content = json.loads(plan.dumps())
    del content["checksum"]
    edit(content)
    with pytest.raises(PlanFormatError) as error:
        Plan.loads(json.dumps(content))
    assert says in str(error.value)


def test_plain_plans_have_no_second_schema():
    content = json.loads(Plan.from_rules(RULES, MODEL).dumps()) | {"schema": "moa-plan/2"}
    del content["checksum"]
    with pytest.raises(PlanFormatError, match="moa-plan/2 is for plans with less than 16 bits"):
        Plan.loads(json.dumps(content))


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2])
@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_bytes_of_a_token_are_those_of_the_codecs(bits, width):
    assert tiers.token_bytes(bits, width) == codes.token_bytes(bits, width)
    assert tiers.wants_transform(bits) == codes.wants_transform(bits)


def test_bytes_count_scales_and_a_sink_in_sixteen_bits(plan):
    length, width, sink = 1000, MODEL.head_dim, plan.sink
    by_hand = 0
    for spans, heads in zip(plan.spans(length), MIXED, strict=True):
        for span, bits in zip(spans, heads, strict=True):
            for side in bits:
                coded = width * 2 if side == 16 else -(-width * side // 8) + 2
                by_hand += sink * width * 2 + (span - sink) * coded
    assert plan.kv_bytes(length) == by_hand
    assert plan.kv_bytes(length, batch=3) == 3 * by_hand
    assert plan.share(length) == by_hand / (4 * length * width * 2 * 2)
    plain = Plan.from_rules(RULES, MODEL)
    assert plain.share(length) == pytest.approx(plain.density(length))


def test_fixed_at_a_length_heads_keep_their_bits(plan):
    fixed = plan.anchored_at(512)
    assert fixed.tiers == MIXED
    assert fixed.key_transforms is plan.key_transforms


def test_schemas_are_named_in_order():
    assert PLAN_SCHEMAS == ("moa-plan/1", "moa-plan/2")


@pytest.mark.parametrize("name", ["moa", "duo"])
def test_formats_of_others_have_no_bits(plan, name):
    write = {"moa": write_moa, "duo": write_duo}[name]
    with pytest.raises(ConfigError, match="some heads store fewer than 16 bits"):
        write(plan)


def test_what_a_plan_shows_says_the_bits(plan):
    assert [plan.rule_text(0, head) for head in (0, 1)] == ["320, 4/8 bits", "dense"]
    frame = plan.to_frame(512)
    assert frame[["key_bits", "value_bits"]].to_numpy().tolist() == [list(tier) for layer in MIXED for tier in layer]
    changed = plan.diff(Plan.from_rules(RULES, MODEL), 512)
    assert changed["rule"].tolist() == ["320, 4/8 bits", "0.625n+64, 8/2 bits", "dense, 3/4 bits"]
