from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moa_search.errors import ConfigError, PlanFormatError, PlanVersionError
from moa_search.formats import ModelSignature, Plan, Profile
from moa_search.formats.plan import plan_json_schema
from moa_search.formats.provenance import Budget, Provenance, Validation
from moa_search.masks import span_mask
from moa_search.spans import BETA_ONE, DENSE, SpanRule

REPOSITORY = Path(__file__).parents[3]
SCHEMA_FILE = REPOSITORY / "docs" / "plan.schema.json"
GOLDEN = REPOSITORY / "tests" / "golden" / "moa-plan-1.json"


def without_checksum(plan: Plan) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(plan.dumps())
    del content["checksum"]
    return content


def error_of(content: object, kind: type[Exception] = PlanFormatError) -> str:
    """The one-line error that reading ``content`` as ``my.json`` ends in, less the file's name."""
    with pytest.raises(kind) as caught:
        Plan.loads(content if isinstance(content, str) else json.dumps(content), source="my.json")
    message = str(caught.value)
    assert message.startswith("my.json: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix("my.json: ")


def validation(**changes: Any) -> Validation:
    fields = {"length": 4096, "data": "sha256:" + "2" * 64, "samples": 16, "loss": 0.5, "loss_error": 0.0625}
    return Validation(**fields | {"dense_loss": 0.25} | changes)


def test_round_trip_through_a_file(tiny_plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    tiny_plan.save(path)
    loaded = Plan.load(path)
    assert loaded == tiny_plan
    assert loaded.rules == tiny_plan.rules
    loaded.save(path)
    assert path.read_text() == tiny_plan.dumps()


@given(
    rules=st.lists(
        st.builds(SpanRule, alpha=st.integers(-(2**31), 2**31 - 1), beta_256=st.integers(0, BETA_ONE)),
        min_size=2,
        max_size=2,
    ),
    sink=st.integers(0, 2**20),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    text=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_round_trip_of_any_values(rules: list[SpanRule], sink: int, weight: float, text: str) -> None:
    model = ModelSignature(
        architecture=text, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=1
    )
    provenance = Provenance(searcher=text, length_weights={text: weight})
    plan = Plan.from_rules([rules], model, sink=sink, provenance=provenance)
    loaded = Plan.loads(plan.dumps())
    assert loaded == plan
    assert loaded.dumps() == plan.dumps()
    assert [rule.is_dense or rule for rule in loaded.rules[0]] == [rule.is_dense or rule for rule in rules]


@pytest.mark.parametrize("text", ['"@"', '\n  "patterns": []', "\\", "\u2028"])
def test_names_that_look_like_the_format(tiny_signature: ModelSignature, text: str) -> None:
    plan = Plan.uniform(DENSE, tiny_signature, provenance=Provenance(searcher=text))
    assert Plan.loads(plan.dumps()) == plan


def test_dumps_is_for_reading_and_diffing(tiny_plan: Plan) -> None:
    lines = tiny_plan.dumps().splitlines()
    keys = [line.split('"')[1] for line in lines if line.startswith('  "')]
    assert keys == [
        "schema",
        "library_version",
        "model",
        "sink",
        "block",
        "anchor",
        "provenance",
        "predicted",
        "patterns",
        "checksum",
    ]
    assert '    [{"kind": "span", "alpha": 64, "beta_256": 48}, {"kind": "dense"}],' in lines
    changed = Plan.from_rules([[DENSE] * 2, *tiny_plan.rules[1:]], tiny_plan.model, sink=4)
    kept = tiny_plan.model_copy(update={"patterns": changed.patterns}).dumps().splitlines()
    differing = [i for i, (a, b) in enumerate(zip(lines, kept, strict=True)) if a != b]
    assert len(differing) == 2  # that layer and the checksum


def test_checksum_covers_every_part(tiny_plan: Plan) -> None:
    variants = [
        tiny_plan,
        tiny_plan.model_copy(update={"sink": 5}),
        tiny_plan.model_copy(update={"anchor": "prompt"}),
        tiny_plan.model_copy(update={"patterns": tiny_plan.patterns[::-1]}),
        tiny_plan.model_copy(update={"provenance": None}),
        tiny_plan.model_copy(update={"predicted": ()}),
        tiny_plan.model_copy(update={"library_version": "0"}),
        tiny_plan.model_copy(update={"validated": (validation(),)}),
    ]
    assert len({plan.checksum for plan in variants}) == len(variants)
    assert Plan.loads(tiny_plan.dumps()).checksum == tiny_plan.checksum


def test_a_plan_may_be_written_by_hand(tiny_plan: Plan) -> None:
    content = {
        "schema": "moa-plan/1",
        "model": {
            "architecture": "llama",
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        },
        "patterns": [[{"kind": "dense"}, {"kind": "span", "alpha": 0, "beta_256": 64}]],
    }
    plan = Plan.loads(json.dumps(content))
    assert plan.rules == [[DENSE, SpanRule(0, 64)]]
    assert (plan.sink, plan.block, plan.anchor) == (16, 32, "position")


def test_an_edit_is_noticed_unless_the_checksum_is_removed(tiny_plan: Plan) -> None:
    edited = tiny_plan.dumps().replace('"alpha": 128', '"alpha": 192')
    assert "doesn't match its checksum" in error_of(edited)
    content = json.loads(edited)
    del content["checksum"]
    assert Plan.loads(json.dumps(content)).rules[2][0] == SpanRule(192, 48)


def put(value: object, *where: str | int) -> Callable[[dict[str, Any]], None]:
    """A change that sets the entry at the path ``where`` to ``value``."""

    def change(content: dict[str, Any]) -> None:
        target: Any = content
        for key in where[:-1]:
            target = target[key]
        target[where[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(1, "ancor"), "ancor: unknown key (did you mean 'anchor'?)"),
        (put(1, "patterns", 0, 0, "bta_256"), "patterns.0.0.span.bta_256: unknown key (did you mean 'beta"),
        (put(1, "model", "zzz\nzzz"), "model.zzz\\nzzz: unknown key"),
        (put(300, "patterns", 2, 1, "beta_256"), "patterns.2.1.span.beta_256: Input should be less than"),
        (put("64", "patterns", 0, 0, "alpha"), "patterns.0.0.span.alpha: Input should be a valid integer"),
        (put(True, "sink"), "sink: Input should be a valid integer"),
        (put(-1, "sink"), "sink: Input should be greater than or equal to 0"),
        (put("whenever", "anchor"), "anchor: Input should be 'position' or 'prompt'"),
        (put("wave", "patterns", 1, 0, "kind"), "patterns.1.0: Input tag 'wave' found"),
        (put([], "patterns"), "top level: patterns of 0 layers, the model has 3"),
        (put([{"kind": "dense"}], "patterns", 1), "top level: layer 1 has 1 patterns, the model has 2"),
        (put(4, "model", "num_hidden_layers"), "top level: patterns of 3 layers, the model has 4"),
        (put(3, "model", "num_key_value_heads"), "model: 4 query heads can't share 3 KV heads evenly"),
        (put("sha256:0", "checksum"), "its content doesn't match its checksum"),
        (put(["x"], "checksum"), "its content doesn't match its checksum"),
        (put("moa-profile/1", "schema"), 'not a moa-search plan (no "schema": "moa-plan/1")'),
        (lambda content: content.pop("model"), "model: Field required"),
        (lambda content: content.pop("schema"), 'not a moa-search plan (no "schema": "moa-plan/1")'),
    ],
)  # fmt: skip
def test_errors_say_what_and_where(tiny_plan: Plan, change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = without_checksum(tiny_plan)
    change(content)
    assert error_of(content).startswith(message)


@pytest.mark.parametrize("schema", ["moa-plan/3", "moa-plan/1.1", "moa-plan/\n"])
def test_another_schema_asks_for_an_upgrade(tiny_plan: Plan, schema: str) -> None:
    message = error_of({**without_checksum(tiny_plan), "schema": schema, "new": 1}, PlanVersionError)
    assert "is unknown to moa-search" in message
    assert message.endswith("upgrade it")


def test_several_problems_are_counted(tiny_plan: Plan) -> None:
    content = {**without_checksum(tiny_plan), "sink": -1, "block": 0}
    assert error_of(content).endswith("(and 1 more)")


def test_missing_files_and_folders(tiny_plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json: No such file or directory$"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match=r"Is a directory$"):
        Plan.load(tmp_path)
    tiny_plan.save(tmp_path / "quarter.json")
    for read in (Plan.load, Profile.load):
        with pytest.raises(
            ConfigError, match=r"quater\.json: No such file or directory \(did you mean 'quarter.json'\?\)$"
        ):
            read(tmp_path / "quater.json")
        with pytest.raises(ConfigError, match=r"Is a directory; give a file in it, such as quarter\.json$"):
            read(tmp_path)
    with pytest.raises(ConfigError, match=r"Not a directory$"):
        Plan.load(tmp_path / "quarter.json" / "half.json")


def test_whatever_stands_for_a_plan_is_read(tiny_plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    tiny_plan.save(path)
    content = json.loads(path.read_text())
    in_a_configuration = tiny_plan.model_dump(mode="json", by_alias=True)
    text = path.read_text()
    for stands in (tiny_plan, str(path), path, text, content, MappingProxyType(content), in_a_configuration):
        assert Plan.of(stands) == tiny_plan
    assert Plan.of(tiny_plan) is tiny_plan


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        (None, ConfigError, "under_plan: a NoneType is no plan; give a Plan, a plan file or its content"),
        ([], ConfigError, "a list is no plan"),
        ({}, PlanFormatError, "under_plan: not a moa-search plan"),
        ({"schema": "moa-plan/9"}, PlanVersionError, "under_plan: schema moa-plan/9 is unknown"),
        ({"schema": "moa-plan/1", "sink": object()}, PlanFormatError, "under_plan: .*not JSON serializable"),
        ("absent.json", ConfigError, "absent.json: No such file"),
        ("two\nlines.json", ConfigError, r"^two\\nlines.json: No such file"),
    ],
)
def test_what_is_no_plan_is_refused_by_the_arguments_name(argument: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Plan.of(argument, "under_plan")


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(PlanFormatError) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"{path}: not a JSON file, or a truncated one (")


def test_values_are_checked_when_made_in_python_too(tiny_signature: ModelSignature) -> None:
    with pytest.raises(ValidationError):
        Plan.from_rules([[DENSE]], tiny_signature)
    with pytest.raises(ValidationError):
        Plan.uniform(DENSE, tiny_signature, sink=-1)
    with pytest.raises(ValidationError):
        Provenance(searcher="exact", gap=float("nan"))


def test_densities_and_bytes_count_the_masks(tiny_plan: Plan) -> None:
    length = 300
    masks = np.stack(
        [
            span_mask(rule, length, sink=tiny_plan.sink, min_span=tiny_plan.min_span)
            for layer in tiny_plan.rules
            for rule in layer
        ]
    )
    kept = int(masks[:, -1].sum())
    assert sum(map(sum, tiny_plan.spans(length))) == kept
    assert tiny_plan.density(length) == pytest.approx(kept / (6 * length))
    assert tiny_plan.attention_density(length) == pytest.approx(masks.sum() / (6 * length * (length + 1) / 2))
    assert tiny_plan.kv_bytes(length) == kept * 2 * 8 * 2
    assert tiny_plan.kv_bytes(length, batch=3, bytes_per_element=4) == kept * 2 * 8 * 4 * 3


def test_anchored_at_fixes_every_span(tiny_plan: Plan) -> None:
    fixed = tiny_plan.anchored_at(1000)
    assert fixed.anchor == "position"
    assert fixed.predicted == ()
    assert fixed.spans(1000) == tiny_plan.spans(1000)
    assert fixed.spans(100_000) == tiny_plan.spans(1000)
    assert fixed.density(1000) == tiny_plan.density(1000)
    assert Plan.loads(fixed.dumps()) == fixed


class TestFingerprint:
    def test_changes_with_what_the_model_computes(self, tiny_plan: Plan) -> None:
        other_model = tiny_plan.model.model_copy(update={"config": {"hidden_size": 33}})
        variants = [
            tiny_plan,
            tiny_plan.model_copy(update={"sink": 5}),
            tiny_plan.model_copy(update={"block": 33}),
            tiny_plan.model_copy(update={"anchor": "prompt"}),
            tiny_plan.model_copy(update={"patterns": tiny_plan.patterns[::-1]}),
            tiny_plan.model_copy(update={"model": other_model}),
        ]
        assert len({plan.fingerprint for plan in variants}) == len(variants)

    def test_and_with_nothing_else(self, tiny_plan: Plan) -> None:
        variants = [
            tiny_plan.model_copy(update={"provenance": None}),
            tiny_plan.model_copy(update={"predicted": ()}),
            tiny_plan.model_copy(update={"validated": (validation(),)}),
            tiny_plan.model_copy(update={"library_version": "0"}),
            Plan.loads(tiny_plan.dumps()),
        ]
        assert {plan.fingerprint for plan in variants} == {tiny_plan.fingerprint}

    def test_stays_the_same_for_good(self) -> None:
        """Files of measured losses are named by it."""
        expected = "sha256:7292f9d5ca2d064457aacaa7192a79ad80b0960e94ed2ff855d2ca6b1efd1623"
        assert Plan.load(GOLDEN).fingerprint == expected


class TestValidated:
    def test_round_trip(self, tiny_plan: Plan) -> None:
        entries = (validation(), validation(length=8192, loss_error=None, dense_loss=None))
        plan = tiny_plan.model_copy(update={"validated": entries})
        text = plan.dumps()
        loaded = Plan.loads(text)
        assert loaded.validated == entries
        assert loaded.dumps() == text
        jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(json.loads(text))

    def test_no_key_without_an_entry(self, tiny_plan: Plan) -> None:
        """So that plans from before there were entries keep their bytes; an empty list reads as none."""
        content = without_checksum(tiny_plan)
        assert "validated" not in content
        assert Plan.loads(json.dumps({**content, "validated": []})) == tiny_plan

    def test_belong_to_the_plan_as_it_was(self, tiny_plan: Plan) -> None:
        assert tiny_plan.model_copy(update={"validated": (validation(),)}).anchored_at(500).validated == ()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (put(0, "validated", 0, "length"), "validated.0.length: Input should be greater than or equal to 1"),
            (put(0, "validated", 0, "samples"), "validated.0.samples: Input should be greater than or equal to 1"),
            (put(-0.5, "validated", 0, "loss_error"), "validated.0.loss_error: Input should be greater than or equal"),
            (put(1, "validated", 0, "los"), "validated.0.los: unknown key (did you mean 'loss'?)"),
        ],
    )
    def test_errors_say_what_and_where(
        self, tiny_plan: Plan, change: Callable[[dict[str, Any]], None], message: str
    ) -> None:
        content = without_checksum(tiny_plan.model_copy(update={"validated": (validation(),)}))
        change(content)
        assert error_of(content).startswith(message)


class TestBudgets:
    def test_as_they_were_asked_for_survive_a_round_trip(self, tiny_plan: Plan) -> None:
        budgets = (
            Budget(length=1024, density=0.5),
            Budget(length=2048, density=0.25, asked="1.5GiB@2048x4"),
            Budget(length=4096, asked="20ms@4096", hardware="H200"),
        )
        assert tiny_plan.provenance is not None
        provenance = tiny_plan.provenance.model_copy(update={"budgets": budgets})
        text = tiny_plan.model_copy(update={"provenance": provenance}).dumps()
        loaded = Plan.loads(text)
        assert loaded.provenance is not None
        assert loaded.provenance.budgets == budgets
        assert loaded.dumps() == text
        assert json.loads(text)["provenance"]["budgets"] == [
            {"length": 1024, "density": 0.5},
            {"length": 2048, "density": 0.25, "asked": "1.5GiB@2048x4"},
            {"length": 4096, "asked": "20ms@4096", "hardware": "H200"},
        ]
        jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(json.loads(text))

    def test_that_bound_nothing_are_refused(self, tiny_plan: Plan) -> None:
        content = without_checksum(tiny_plan)
        put([{"length": 1024}], "provenance", "budgets")(content)
        assert error_of(content) == "provenance.budgets.0: neither density nor share nor asked says what is bounded"


class TestNativeLayers:
    def test_round_trip(self, native_plan: Plan) -> None:
        text = native_plan.dumps()
        assert '    [{"kind": "native"}, {"kind": "native"}],' in text.splitlines()
        loaded = Plan.loads(text)
        assert loaded == native_plan
        assert loaded.native_layers == (1,)
        assert loaded.native_window == 128
        jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text())).validate(json.loads(text))

    def test_no_rule_applies_to_them(self, native_plan: Plan) -> None:
        assert native_plan.rules[1] == [DENSE, DENSE]
        uniform = Plan.uniform(SpanRule(90, 0), native_plan.model, native_layers=(0, 2))
        assert uniform.rules == [[DENSE] * 2, [SpanRule(90, 0)] * 2, [DENSE] * 2]
        assert uniform.native_layers == (0, 2)

    def test_there_are_none_unless_named(self, tiny_plan: Plan) -> None:
        assert tiny_plan.native_layers == ()
        assert tiny_plan.native_window is None

    @pytest.mark.parametrize("anchor", ["position", "prompt"])
    @pytest.mark.parametrize("length", [1, 100, 128, 129, 1000])
    def test_densities_are_those_of_the_other_layers(self, native_plan: Plan, length: int, anchor: str) -> None:
        plan = native_plan.model_copy(update={"anchor": anchor})
        smaller = plan.model.model_copy(update={"num_hidden_layers": 2})
        others = Plan(model=smaller, patterns=(plan.patterns[0], plan.patterns[2]), sink=4, block=64, anchor=anchor)
        assert plan.density(length) == others.density(length)
        assert plan.attention_density(length) == others.attention_density(length)

    @pytest.mark.parametrize("length", [1, 100, 128, 129, 1000])
    def test_spans_and_bytes_count_their_window(self, native_plan: Plan, length: int) -> None:
        own = min(length, 128)
        assert native_plan.spans(length)[1] == [own, own]
        other_tokens = native_plan.density(length) * 4 * length
        assert native_plan.kv_bytes(length) == pytest.approx((other_tokens + 2 * own) * 2 * 8 * 2)

    def test_they_stay_native_when_spans_are_fixed(self, native_plan: Plan) -> None:
        fixed = native_plan.anchored_at(600)
        assert fixed.native_layers == (1,)
        assert fixed.spans(600) == native_plan.spans(600)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (put({"kind": "dense"}, "patterns", 1, 1), "layer 1 is native in some KV heads only"),
            (put([[{"kind": "native"}] * 2] * 3, "patterns"), "every layer is native, so there is no head"),
            (put({}, "model", "config"), "layer 1 is native, but model.config names no sliding_window"),
            (put(True, "model", "config", "sliding_window"), "layer 1 is native, but model.config names no"),
            (put(3, "patterns", 1, 0, "alpha"), "patterns.1.0.native.alpha: unknown key"),
        ],
    )
    def test_what_makes_no_sense_is_refused(
        self, native_plan: Plan, change: Callable[[dict[str, Any]], None], message: str
    ) -> None:
        content = without_checksum(native_plan)
        change(content)
        assert error_of(content).removeprefix("top level: ").startswith(message)


def test_a_prompt_anchored_plan_computes_what_its_fixed_spans_do(tiny_plan: Plan) -> None:
    by_prompt = tiny_plan.model_copy(update={"anchor": "prompt"})
    assert by_prompt.density(1000) == tiny_plan.density(1000)
    assert by_prompt.attention_density(1000) == tiny_plan.anchored_at(1000).attention_density(1000)
    assert by_prompt.attention_density(1000) > tiny_plan.attention_density(1000)


def test_the_json_schema_in_docs_is_current() -> None:
    current = json.dumps(plan_json_schema(), indent=2) + "\n"
    assert SCHEMA_FILE.read_text() == current, "write the text on the right to docs/plan.schema.json"


def test_the_json_schema_accepts_plans_and_nothing_else(tiny_plan: Plan) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    validator.check_schema(validator.schema)
    golden = sorted(GOLDEN.parent.glob("moa-plan-*.json"))
    assert {"moa-plan-1.json", "moa-plan-2.json"} <= {file.name for file in golden}
    for file in golden:
        validator.validate(json.loads(file.read_text()))
    for wrong in (5, 32, "8"):
        bits = json.loads((GOLDEN.parent / "moa-plan-2.json").read_text())
        put(wrong, "patterns", 0, 0, "key_bits")(bits)
        assert not validator.is_valid(bits)
    validator.validate(json.loads(tiny_plan.dumps()))
    validator.validate(without_checksum(tiny_plan))
    for change in (
        put(1, "ancor"),
        put("moa-plan/3", "schema"),
        put(300, "patterns", 2, 1, "beta_256"),
        put("wave", "patterns", 1, 0, "kind"),
        put("sha256:0", "checksum"),
        put({}, "patterns", 0, 0),
        lambda content: content.pop("schema"),
        lambda content: content.pop("patterns"),
    ):
        content = without_checksum(tiny_plan)
        change(content)
        assert not validator.is_valid(content)


@pytest.mark.parametrize("ask", ["spans", "density", "attention_density", "kv_bytes", "share", "anchored_at"])
def test_lengths_that_are_none_are_refused(tiny_plan: Plan, ask: str) -> None:
    for length, why in ((0, "at least 1"), (-5, "at least 1"), (10.5, "no whole number"), ("8k", "no whole number")):
        with pytest.raises(ConfigError, match=why):
            getattr(tiny_plan, ask)(length)
    assert getattr(tiny_plan, ask)(np.int64(512)) == getattr(tiny_plan, ask)(512)
