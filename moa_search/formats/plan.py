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
    PrivateAttr,
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
from moa_search.formats.tiers import PLAIN, PLAIN_BITS, Tier, head_bytes, token_bytes, wants_transform
from moa_search.formats.transforms import KeyTransforms
from moa_search.spans import BETA_ONE, BLOCK_TOKENS, DENSE, SINK_TOKENS, SpanRule
from moa_search.version import __version__

PLAN_SCHEMAS: Final = ("moa-plan/1", "moa-plan/2")
"""Of plans whose heads all store 16 bits, and of others."""

Bits = Literal[16, 8, 4, 3, 2]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Stored(_Strict):
    """How precisely a head's keys and values are stored, the sink's tokens aside; 16 bits are the model's own type."""

    key_bits: Bits = Field(default=PLAIN_BITS, description="bits of a number of a key")
    value_bits: Bits = Field(default=PLAIN_BITS, description="bits of a number of a value")

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if (name, value) not in _PLAIN_ENTRIES}

    @property
    def tier(self) -> Tier:
        """Bits of keys and of values."""
        return self.key_bits, self.value_bits


_PLAIN_ENTRIES = (("key_bits", PLAIN_BITS), ("value_bits", PLAIN_BITS))


class SpanPattern(_Stored):
    """``span(n) = alpha + floor(beta_256 / 256 * n)``, clamped as in `moa_search.spans`."""

    kind: Literal["span"] = "span"
    alpha: int = Field(ge=-(2**31), lt=2**31, description="constant part in tokens, may be negative")
    beta_256: int = Field(ge=0, le=BETA_ONE, description="growth per context token in 1/256")

    @property
    def rule(self) -> SpanRule:
        """The rule that this pattern stands for."""
        return SpanRule(self.alpha, self.beta_256)


class DensePattern(_Stored):
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

    @property
    def tier(self) -> Tier:
        """16 bits."""
        return PLAIN


Pattern = Annotated[SpanPattern | DensePattern | NativePattern, Field(discriminator="kind")]


class Budget(_Strict):
    """An upper bound that the plan keeps at one length: on its density, its bytes, or on a time in milliseconds."""

    length: int = Field(ge=1, description="tokens")
    density: float | None = Field(default=None, gt=0, le=1, description="share of the KV cache; None for a time")
    share: float | None = Field(default=None, gt=0, le=1, description="share of the bytes of a 16-bit cache")
    asked: str | None = Field(default=None, description="what the user wrote, where that wasn't a density")
    hardware: str | None = Field(default=None, description="whose cost model a time was computed with")

    @model_validator(mode="after")
    def _bounds_something(self) -> Budget:
        if self.density is None and self.share is None and self.asked is None:
            raise ValueError("neither density nor share nor asked says what is bounded")
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
    density: float = Field(description="share of the dense KV cache's tokens kept, native layers aside")
    share: float | None = Field(default=None, description="share of the dense 16-bit cache's bytes kept, likewise")
    attention_density: float = Field(description="share of causal pairs computed in a prefill, native layers aside")
    loss: float | None = Field(default=None, description="predicted loss, in the criterion's unit")
    loss_error: float | None = Field(default=None, description="standard error of that loss")
    extrapolated: bool = Field(default=False, description="extrapolated from the losses at other lengths")


class Plan(_Strict):
    """For every layer and KV head, a span rule, with the model it was made for.

    Layers whose attention has a sliding window of its own may be native: they stay as the model made them, and
    densities don't count them. A layer is native as a whole, and some layer isn't.

    Attributes:
        schema_: Schema of the file: ``moa-plan/2`` if some head stores fewer than 16 bits, else ``moa-plan/1``.
        library_version: Version of moa-search that wrote it.
        model: Signature of the model.
        sink: First tokens that are always attended.
        block: Tokens added to ``sink`` to give the smallest span.
        anchor: ``position`` evaluates a rule at every query's own position; ``prompt`` once, at the total
            length (MoA's released plans).
        patterns: ``[layer][kv_head]``.
        transforms: Hash of the file beside the plan with the transforms of keys, which keys below 8 bits need.
        provenance: How it was found.
        predicted: Densities and predicted losses per length.
        validated: Losses of sparse forward passes on held-out samples.
    """

    schema_: Literal["moa-plan/1", "moa-plan/2"] = Field(default="moa-plan/1", alias="schema")
    library_version: str = __version__
    model: ModelSignature
    sink: int = Field(default=SINK_TOKENS, ge=0, le=2**20)
    block: int = Field(default=BLOCK_TOKENS, ge=1, le=2**20)
    anchor: Literal["position", "prompt"] = "position"
    patterns: tuple[tuple[Pattern, ...], ...]
    transforms: str | None = Field(default=None, pattern="^sha256:[0-9a-f]{64}$")
    provenance: Provenance | None = None
    predicted: tuple[LengthMetrics, ...] = ()
    validated: tuple[Validation, ...] = ()
    _key_transforms: KeyTransforms | None = PrivateAttr(default=None)

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

    @model_validator(mode="after")
    def _schema_says_whether_bits_differ(self) -> Plan:
        tiers = {pattern.tier for heads in self.patterns for pattern in heads}
        if self.is_plain != (tiers == {PLAIN}):
            what = "in which every head stores" if self.is_plain else "with less than"
            raise ValueError(f"{self.schema_} is for plans {what} 16 bits")
        transformed = any(wants_transform(key_bits) for key_bits, _ in tiers)
        if transformed and self.transforms is None:
            raise ValueError("transforms is missing, which keys below 8 bits need")
        if self.transforms is not None and not transformed:
            raise ValueError("transforms is given, but no head's keys are stored below 8 bits")
        return self

    @classmethod
    def from_rules(
        cls,
        rules: list[list[SpanRule]],
        model: ModelSignature,
        *,
        native_layers: Collection[int] = (),
        tiers: Sequence[Sequence[Tier]] | None = None,
        transforms: KeyTransforms | None = None,
        **fields: Any,
    ) -> Plan:
        """A plan from rules ``[layer][kv_head]``.

        Args:
            rules: The rules; those of native layers don't matter.
            model: Signature of the model.
            native_layers: Layers that keep their own sliding window.
            tiers: Bits of keys and of values ``[layer][kv_head]``, likewise; None for 16.
            transforms: Of keys; kept only if some head's keys are stored below 8 bits.
            **fields: The remaining attributes.

        Raises:
            ValueError: Keys below 8 bits, and no transforms.
        """
        patterns: list[tuple[Pattern, ...]] = []
        for layer, heads in enumerate(rules):
            stored = [PLAIN] * len(heads) if tiers is None else tiers[layer]
            native = layer in native_layers
            patterns.append(
                tuple(NativePattern() if native else _pattern(*head) for head in zip(heads, stored, strict=True))
            )
        found = {pattern.tier for heads in patterns for pattern in heads}
        needed = transforms if any(wants_transform(key_bits) for key_bits, _ in found) else None
        plan = cls(
            schema=PLAN_SCHEMAS[found != {PLAIN}],
            model=model,
            patterns=tuple(patterns),
            transforms=None if needed is None else needed.checksum,
            **fields,
        )
        plan._key_transforms = needed
        return plan

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
    def tiers(self) -> list[list[Tier]]:
        """Bits of keys and of values ``[layer][kv_head]``; 16 in native layers."""
        return [[pattern.tier for pattern in layer] for layer in self.patterns]

    @property
    def is_plain(self) -> bool:
        """Whether every head stores 16 bits."""
        return self.schema_ == PLAN_SCHEMAS[0]

    @property
    def key_transforms(self) -> KeyTransforms | None:
        """Transforms of keys; None if no head's keys are stored below 8 bits.

        Raises:
            PlanFormatError: The plan came without its file, as text.
        """
        if self.transforms is not None and self._key_transforms is None:
            raise PlanFormatError(
                f"plan: its transforms of keys, {KeyTransforms.file_name(self.transforms)}, weren't read with it; "
                "use Plan.load on its file"
            )
        return self._key_transforms

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
        """Bytes of keys and values kept at ``length`` tokens, native layers' too, cache granularity aside.

        Args:
            length: Tokens.
            batch: Samples.
            bytes_per_element: Of numbers stored in 16 bits, i.e. in the model's own type.
        """
        return batch * sum(self._bytes_by_layer(length, bytes_per_element))

    def share(self, length: int) -> float:
        """Share of a dense 16-bit cache's bytes that is kept at ``length`` tokens, native layers aside."""
        layers = [layer for layer in range(len(self.patterns)) if layer not in self.native_layers]
        kept = self._bytes_by_layer(length, 2)
        dense = 2 * token_bytes(PLAIN_BITS, self.model.head_dim) * length * self.model.num_key_value_heads
        return sum(kept[layer] for layer in layers) / (dense * len(layers))

    def _bytes_by_layer(self, length: int, bytes_per_element: int) -> list[int]:
        width, native = self.model.head_dim, self.native_layers
        return [
            sum(
                head_bytes(tokens, tier, width, sink=0 if layer in native else self.sink, plain_bytes=bytes_per_element)
                for tokens, tier in zip(spans_of_layer, tiers_of_layer, strict=True)
            )
            for layer, (spans_of_layer, tiers_of_layer) in enumerate(zip(self.spans(length), self.tiers, strict=True))
        ]

    def anchored_at(self, length: int) -> Plan:
        """The same plan with every rule fixed at its span for ``length`` tokens, anchored at positions."""
        patterns = tuple(
            tuple(
                pattern if pattern.kind == "native" else _pattern(SpanRule(tokens, 0), pattern.tier)
                for pattern, tokens in zip(*layer, strict=True)
            )
            for layer in zip(self.patterns, self.spans(length), strict=True)
        )
        return self.model_copy(update={"anchor": "position", "patterns": patterns, "predicted": (), "validated": ()})

    def resolve(self, length: int) -> Plan:
        """The plan for prompts of ``length`` tokens: one that is anchored at the prompt has constant spans there."""
        return self.anchored_at(length) if self.anchor == "prompt" else self

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the model's output under the plan: two plans with one fingerprint act the same."""
        parts = ("model", "sink", "block", "anchor", "patterns", "transforms")
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
        """Write the plan atomically, and its transforms of keys beside it.

        Raises:
            ConfigError: It can't be written there.
            PlanFormatError: The plan came without its transforms.
        """
        self.save_transforms(Path(path).parent)
        with atomic_write(path) as file:
            file.write(self.dumps().encode())

    def save_transforms(self, folder: str | os.PathLike[str]) -> None:
        """Write the transforms of keys, if the plan needs any, into the folder of its file; raises what `save` does."""
        if self.key_transforms is not None:
            self.key_transforms.save(folder)

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
            raise PlanFormatError(f'{source}: not a moa-search plan (no "schema": "{PLAN_SCHEMAS[0]}")')
        if schema not in PLAN_SCHEMAS:
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
    def from_pretrained(cls, repo: str | os.PathLike[str], name: str | None = None, **options: Any) -> Plan:
        """A plan out of a repository of the Hugging Face hub, or out of a folder.

        Args:
            repo: Such as ``org/plans``, or a folder.
            name: Of the plan; may be left out where there is only one.
            **options: Of `huggingface_hub.hf_hub_download`: ``revision``, ``token``, ``cache_dir``,
                ``local_files_only``, ``force_download``.

        Raises:
            ConfigError: There is no such plan; the error names those that there are.
            HubError: The repository can't be read.
            PlanFormatError: The plan is damaged.
        """
        from moa_search.formats.hub import find_plan

        return cls.load(find_plan(repo, name, **options))

    def push_to_hub(self, repo: str, name: str, **options: Any) -> str:
        """Put the plan, its transforms of keys and a card into a repository of the Hugging Face hub, beside others.

        Args:
            repo: Such as ``org/plans``; made if it isn't there.
            name: Of the plan there, such as ``quarter``.
            **options: Of `moa_search.formats.hub.push_plans`: ``base_model``, ``license``, ``private``, ``token``,
                ``revision``, ``message``, ``create_pr``.

        Returns:
            The commit's address.

        Raises:
            MoAError: As `push_plans` says.
        """
        from moa_search.formats.hub import push_plans

        return push_plans({name: self}, repo, **options)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan file; ``hf://org/plans/name`` is one in a repository of the Hugging Face hub.

        Raises:
            HubError: The repository can't be read.
            ConfigError: There is no such file.
            PlanVersionError: The schema is of another version.
            PlanFormatError: The file is no valid plan, or its transforms of keys are missing, foreign or altered.
        """
        if os.fspath(path).startswith("hf://"):
            from moa_search.formats.hub import locate

            path = locate(os.fspath(path))
        try:
            plan = cls.loads(Path(path).read_bytes(), source=str(path))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}") from None
        if plan.transforms is not None:
            plan._key_transforms = KeyTransforms.load(Path(path).parent, plan.transforms, plan.model, str(path))
        return plan

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
        if self.transforms is None:
            del content["transforms"]  # likewise
        for metrics in content["predicted"]:
            if not metrics["extrapolated"]:
                del metrics["extrapolated"]
            if metrics["share"] is None:
                del metrics["share"]
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


def _pattern(rule: SpanRule, tier: Tier) -> Pattern:
    bits: dict[str, Any] = dict(zip(("key_bits", "value_bits"), tier, strict=True))
    return DensePattern(**bits) if rule.is_dense else SpanPattern(alpha=rule.alpha, beta_256=rule.beta_256, **bits)


def _checksum(content: dict[str, Any]) -> str:
    return sha256_of(canonical_json(content))


def _keys() -> set[str]:
    """Every key that may appear somewhere in the file."""
    kinds = (Plan, ModelSignature, Provenance, Budget, LengthMetrics, Validation, SpanPattern)
    return {field.alias or name for kind in kinds for name, field in kind.model_fields.items()}
