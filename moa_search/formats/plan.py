"""Plan files: one span rule per layer and KV head, as small diffable JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from moa_search import spans
from moa_search.errors import ConfigError, PlanFormatError, PlanVersionError
from moa_search.formats import plan_views
from moa_search.formats.files import (
    atomic_write,
    canonical_json,
    describe_invalid,
    one_line,
    parse_plan_json,
    sha256_of,
)
from moa_search.formats.signature import ModelSignature
from moa_search.spans import BETA_ONE, BLOCK_TOKENS, DENSE, SINK_TOKENS, SpanRule
from moa_search.version import __version__

__all__ = [
    "PLAN_SCHEMA",
    "Budget",
    "DensePattern",
    "LengthMetrics",
    "NativePattern",
    "Plan",
    "PlanLike",
    "Provenance",
    "SpanPattern",
    "Validation",
    "own_window",
    "plan_json_schema",
]

PLAN_SCHEMA: Final = "moa-plan/1"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SpanPattern(_Strict):
    """``span(n) = alpha + floor(beta_256 / 256 * n)``, clamped as in `moa_search.spans`."""

    kind: Literal["span"] = "span"
    alpha: int = Field(ge=-(2**31), lt=2**31, description="constant part in tokens, may be negative")
    beta_256: int = Field(ge=0, le=BETA_ONE, description="growth per context token in 1/256")

    @property
    def rule(self) -> SpanRule:
        """The rule that this pattern stands for."""
        return SpanRule(self.alpha, self.beta_256)


class DensePattern(_Strict):
    """Every key is kept."""

    kind: Literal["dense"] = "dense"

    @property
    def rule(self) -> SpanRule:
        """The rule that this pattern stands for."""
        return DENSE


class NativePattern(_Strict):
    """The layer's own sliding window (``sliding_window`` in the model's configuration) is kept, and no rule applies."""

    kind: Literal["native"] = "native"

    @property
    def rule(self) -> SpanRule:
        """Dense: nothing is dropped beyond what the model's own window hides."""
        return DENSE


Pattern = Annotated[SpanPattern | DensePattern | NativePattern, Field(discriminator="kind")]


class Budget(_Strict):
    """An upper bound that the plan keeps at one length: on its density, or on a time in milliseconds."""

    length: int = Field(ge=1, description="tokens")
    density: float | None = Field(default=None, gt=0, le=1, description="share of the KV cache; None for a time")
    asked: str | None = Field(default=None, description="what the user wrote, where that wasn't a density")
    hardware: str | None = Field(default=None, description="whose cost model a time was computed with")

    @model_validator(mode="after")
    def _bounds_something(self) -> Budget:
        if self.density is None and self.asked is None:
            raise ValueError("neither density nor asked says what is bounded")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}


class Provenance(_Strict):
    """How a plan came about: enough to make it again."""

    searcher: str
    profile: str | None = Field(default=None, description="checksum of the profile file")
    criterion: str | None = None
    budgets: tuple[Budget, ...] = ()
    length_weights: dict[str, float] = Field(default_factory=dict, description="weight of each length's loss")
    objective: float | None = Field(default=None, description="weighted loss of this plan")
    dual_bound: float | None = Field(default=None, description="proven lower bound of the weighted loss")
    gap: float | None = Field(default=None, description="(objective - dual bound) / objective")
    versions: dict[str, str] = Field(default_factory=dict)
    knobs: dict[str, float | str] = Field(default_factory=dict, description="setting of the outer loop that found it")
    notes: tuple[str, ...] = Field(default=(), description="what an import from another format changed and cost")

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if name not in ("knobs", "notes") or value}


class Validation(_Strict):
    """What a plan loses on samples that neither profile nor search have seen."""

    length: int = Field(ge=1, description="tokens per sample")
    data: str = Field(description="hash of the samples")
    samples: int = Field(ge=1)
    loss: float = Field(description="mean loss under the plan, in nats per answer token")
    loss_error: float | None = Field(
        default=None, ge=0, description="its standard error over samples; None where there are too few to tell"
    )
    dense_loss: float | None = Field(default=None, description="mean loss of the same samples without a plan")


class LengthMetrics(_Strict):
    """What a plan costs at one length."""

    length: int = Field(ge=1, description="tokens")
    density: float = Field(description="share of the dense KV cache kept, native layers aside")
    attention_density: float = Field(description="share of causal pairs computed in a prefill, native layers aside")
    loss: float | None = Field(default=None, description="predicted loss, in the criterion's unit")
    loss_error: float | None = Field(default=None, description="standard error of that loss")
    extrapolated: bool = Field(default=False, description="extrapolated from the losses at other lengths")


class Plan(_Strict):
    """For every layer and KV head, a span rule, with the model it was made for.

    Layers whose attention has a sliding window of its own may be native: they stay as the model made them, and
    densities don't count them. A layer is native as a whole, and some layer isn't.

    Attributes:
        schema_: Schema of the file, ``moa-plan/1``.
        library_version: Version of moa-search that wrote it.
        model: Signature of the model.
        sink: First tokens that are always attended.
        block: Tokens added to ``sink`` to give the smallest span.
        anchor: ``position`` evaluates a rule at every query's own position; ``prompt`` once, at the total
            length (MoA's released plans).
        patterns: ``[layer][kv_head]``.
        provenance: How it was found.
        predicted: Densities and predicted losses per length.
        validated: Losses of sparse forward passes on held-out samples.
    """

    schema_: Literal["moa-plan/1"] = Field(default=PLAN_SCHEMA, alias="schema")
    library_version: str = __version__
    model: ModelSignature
    sink: int = Field(default=SINK_TOKENS, ge=0, le=2**20)
    block: int = Field(default=BLOCK_TOKENS, ge=1, le=2**20)
    anchor: Literal["position", "prompt"] = "position"
    patterns: tuple[tuple[Pattern, ...], ...]
    provenance: Provenance | None = None
    predicted: tuple[LengthMetrics, ...] = ()
    validated: tuple[Validation, ...] = ()

    # Frames and pictures, in a module of their own.
    by_length: ClassVar = plan_views.by_length
    cell_texts: ClassVar = plan_views.cell_texts
    diff: ClassVar = plan_views.diff
    plot_density: ClassVar = plan_views.plot_density
    plot_diff: ClassVar = plan_views.plot_diff
    plot_mask: ClassVar = plan_views.plot_mask
    plot_spans: ClassVar = plan_views.plot_spans
    rule_text: ClassVar = plan_views.rule_text
    shares: ClassVar = plan_views.shares
    to_frame: ClassVar = plan_views.to_frame
    _repr_html_: ClassVar = plan_views.to_html

    @model_validator(mode="after")
    def _shape_matches_model(self) -> Plan:
        if len(self.patterns) != self.model.num_hidden_layers:
            raise ValueError(f"patterns of {len(self.patterns)} layers, the model has {self.model.num_hidden_layers}")
        for layer, heads in enumerate(self.patterns):
            if len(heads) != self.model.num_key_value_heads:
                raise ValueError(
                    f"layer {layer} has {len(heads)} patterns, the model has {self.model.num_key_value_heads} KV heads"
                )
        return self

    @model_validator(mode="after")
    def _native_layers_make_sense(self) -> Plan:
        for layer, heads in enumerate(self.patterns):
            if len({pattern.kind == "native" for pattern in heads}) > 1:
                raise ValueError(f"layer {layer} is native in some KV heads only; a layer is native as a whole")
        native = self.native_layers
        if native and own_window(self.model) is None:
            raise ValueError(f"layer {native[0]} is native, but model.config names no sliding_window")
        if len(native) == len(self.patterns):
            raise ValueError("every layer is native, so there is no head that a plan could shorten")
        return self

    @classmethod
    def from_rules(
        cls, rules: list[list[SpanRule]], model: ModelSignature, *, native_layers: Collection[int] = (), **fields: Any
    ) -> Plan:
        """A plan from rules ``[layer][kv_head]``.

        Args:
            rules: The rules; those of native layers don't matter.
            model: Signature of the model.
            native_layers: Layers that keep their own sliding window.
            **fields: The remaining attributes.
        """
        patterns = [tuple(_pattern(rule) for rule in heads) for heads in rules]
        for layer in native_layers:
            patterns[layer] = tuple(NativePattern() for _ in patterns[layer])
        return cls(model=model, patterns=tuple(patterns), **fields)

    @classmethod
    def uniform(cls, rule: SpanRule, model: ModelSignature, **fields: Any) -> Plan:
        """A plan that gives every head the same rule; ``fields`` as for `from_rules`."""
        rules = [[rule] * model.num_key_value_heads for _ in range(model.num_hidden_layers)]
        return cls.from_rules(rules, model, **fields)

    @property
    def lengths(self) -> list[int]:
        """Lengths in tokens that the plan was made for, else a quarter, half and all of the model's context."""
        return plan_views.usual_lengths(self)

    @property
    def density_lengths(self) -> list[int]:
        """From 64 tokens up to the model's context, eight per octave: where `plot_density` draws by default."""
        return plan_views.density_lengths(self)

    @property
    def rules(self) -> list[list[SpanRule]]:
        """Rules ``[layer][kv_head]``; dense in native layers, whose own window hides keys on top of that."""
        return [[pattern.rule for pattern in layer] for layer in self.patterns]

    @property
    def native_layers(self) -> tuple[int, ...]:
        """Layers that keep their own sliding window, increasing."""
        return tuple(layer for layer, heads in enumerate(self.patterns) if heads[0].kind == "native")

    @property
    def native_window(self) -> int | None:
        """Tokens that a query of a native layer attends at most, itself included; None without such layers."""
        return own_window(self.model) if self.native_layers else None

    @property
    def min_span(self) -> int:
        """Smallest span in tokens."""
        return self.sink + self.block

    def spans(self, length: int) -> list[list[int]]:
        """Keys kept per ``[layer][kv_head]`` at a context of ``length`` tokens; of native layers, their own window."""
        native, window = self.native_layers, self.native_window
        return [
            [
                min(length, window) if window and layer in native else spans.span(length, rule, self.min_span)
                for rule in heads
            ]
            for layer, heads in enumerate(self.rules)
        ]

    def density(self, length: int) -> float:
        """Share of the dense KV cache that is kept at ``length`` tokens, over all heads but those of native layers."""
        return spans.density(self._searchable_rules(), length, self.min_span)

    def attention_density(self, length: int) -> float:
        """Share of causal query-key pairs computed in a prefill of ``length`` tokens, over the heads of `density`."""
        return self.attention_densities([length])[0]

    def attention_densities(self, lengths: Sequence[int]) -> list[float]:
        """`attention_density` at several lengths, in the time of the longest one (unless anchored at the prompt)."""
        if self.anchor == "prompt":
            return [self.resolve(length).attention_density(length) for length in lengths]
        return spans.attention_densities(self._searchable_rules(), lengths, self.min_span)

    def kv_bytes(self, length: int, *, batch: int = 1, bytes_per_element: int = 2) -> int:
        """Bytes of keys and values kept at ``length`` tokens, native layers' too, cache granularity aside."""
        tokens = sum(map(sum, self.spans(length)))
        return 2 * tokens * self.model.head_dim * bytes_per_element * batch

    def anchored_at(self, length: int) -> Plan:
        """The same plan with every rule fixed at its span for ``length`` tokens, anchored at positions."""
        fixed = [[SpanRule(tokens, 0) for tokens in layer] for layer in self.spans(length)]
        patterns = Plan.from_rules(fixed, self.model, native_layers=self.native_layers).patterns
        return self.model_copy(update={"anchor": "position", "patterns": patterns, "predicted": (), "validated": ()})

    def resolve(self, length: int) -> Plan:
        """The plan for prompts of ``length`` tokens: one that is anchored at the prompt has constant spans there."""
        return self.anchored_at(length) if self.anchor == "prompt" else self

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the model's output under the plan: two plans with one fingerprint act the same."""
        parts = ("model", "sink", "block", "anchor", "patterns")
        return _checksum({name: value for name, value in self._content().items() if name in parts})

    @property
    def checksum(self) -> str:
        """Hash of everything in the plan; two plans with one checksum are the same."""
        return _checksum(self._content())

    def dumps(self) -> str:
        """The file's text: stable key order, one line per layer."""
        content = self._content()
        lines = [json.dumps(layer) for layer in content.pop("patterns")]
        body = ",\n    ".join(lines)
        text = json.dumps({**content, "patterns": [], "checksum": self.checksum}, indent=2, allow_nan=False)
        # Strings hold no raw line breaks, so this can only be the key at the top level.
        return text.replace('\n  "patterns": []', f'\n  "patterns": [\n    {body}\n  ]') + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan atomically."""
        with atomic_write(path) as file:
            file.write(self.dumps().encode())

    @classmethod
    def loads(cls, text: str | bytes, source: str = "plan") -> Plan:
        """Read a plan from JSON text; ``source`` names it in errors.

        Raises:
            PlanVersionError: The schema is of another version.
            PlanFormatError: The text is no valid plan.
        """
        content = parse_plan_json(text, source)
        schema = content.get("schema") if isinstance(content, dict) else None
        if not isinstance(schema, str) or not schema.startswith("moa-plan/"):
            raise PlanFormatError(f'{source}: not a moa-search plan (no "schema": "{PLAN_SCHEMA}")')
        if schema != PLAN_SCHEMA:
            raise PlanVersionError(
                f"{source}: schema {one_line(schema)} is unknown to moa-search {__version__}; upgrade it"
            )
        checksum = content.pop("checksum", None)
        try:
            plan = cls.model_validate_json(json.dumps(content), strict=True)
        except ValidationError as error:
            raise PlanFormatError(f"{source}: {describe_invalid(error, _keys())}") from None
        except RecursionError:
            raise PlanFormatError(f"{source}: nested too deeply for a plan") from None
        if checksum is not None and checksum != _checksum(content):
            raise PlanFormatError(
                f"{source}: its content doesn't match its checksum; restore the file, "
                'or remove the "checksum" line if you changed it on purpose'
            )
        return plan

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file.

        Raises:
            ConfigError: There is no such file.
            PlanVersionError: The schema is of another version.
            PlanFormatError: The file is no valid plan.
        """
        try:
            return cls.loads(Path(path).read_bytes(), source=str(path))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None

    @classmethod
    def of(cls, plan: PlanLike, name: str = "plan") -> Plan:
        """The plan that an argument stands for, wherever a function asks for one.

        Args:
            plan: A Plan, a plan file, or a plan's content as ``json.load`` gives it (``config.moa_plan``).
            name: Of the argument, for errors.

        Raises:
            ConfigError: There is no such file, or it is something else.
            PlanVersionError: The schema is of another version.
            PlanFormatError: The file or content is no valid plan.
        """
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, str | os.PathLike):
            return cls.load(plan)
        if isinstance(plan, Mapping):
            try:
                text = json.dumps(dict(plan))
            except (TypeError, ValueError) as error:
                raise PlanFormatError(f"{name}: {error}") from None
            return cls.loads(text, source=name)
        raise ConfigError(f"{name}: a {type(plan).__name__} is no plan; give a Plan, a plan file or its content")

    def applied(
        self, model: Any, *, impl: Literal["auto", "triton", "cpu", "torch"] = "auto"
    ) -> AbstractContextManager[Any]:
        """``with plan.applied(model):`` puts a model under this plan for the block, as `moa_search.applied` does."""
        import moa_search

        return moa_search.applied(model, self, impl=impl)

    def _searchable_rules(self) -> list[SpanRule]:
        native = self.native_layers
        return [rule for layer, heads in enumerate(self.rules) if layer not in native for rule in heads]

    def _content(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", by_alias=True)
        if not self.validated:
            del content["validated"]  # as in files from before it: equal plans give equal bytes
        for metrics in content["predicted"]:
            if not metrics["extrapolated"]:
                del metrics["extrapolated"]  # likewise
        return content


PlanLike: TypeAlias = Plan | str | os.PathLike[str] | Mapping[str, Any]
"""What `Plan.of` takes."""


def plan_json_schema() -> dict[str, Any]:
    """The JSON Schema of a plan file, for editors and other languages (``docs/plan.schema.json``).

    It can't say that ``patterns`` is as large as ``model`` demands, which layers may be native, nor what
    ``checksum`` must be.
    """
    schema = Plan.model_json_schema(by_alias=True)
    del schema["properties"]["library_version"]["default"]
    schema["properties"]["checksum"] = {
        "title": "Checksum",
        "description": "hash of everything else, checked where present",
        "anyOf": [{"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}, {"type": "null"}],
        "default": None,
    }
    schema["required"] = ["schema", *schema["required"]]
    for kind in (SpanPattern, DensePattern, NativePattern):
        definition = schema["$defs"][kind.__name__]
        definition["required"] = ["kind", *definition.get("required", [])]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def own_window(model: ModelSignature) -> int | None:
    """The sliding window in tokens that the model's configuration names, or None."""
    window = model.config.get("sliding_window")
    return window if type(window) is int and window > 0 else None


def _pattern(rule: SpanRule) -> Pattern:
    return DensePattern() if rule.is_dense else SpanPattern(alpha=rule.alpha, beta_256=rule.beta_256)


def _checksum(content: dict[str, Any]) -> str:
    return sha256_of(canonical_json(content))


def _keys() -> set[str]:
    """Every key that may appear somewhere in the file."""
    kinds = (Plan, ModelSignature, Provenance, Budget, LengthMetrics, Validation, SpanPattern)
    return {field.alias or name for kind in kinds for name, field in kind.model_fields.items()}
