"""Plan files: one span rule per layer and KV head, as small diffable JSON.

`Plan` is put together from its ideas: what it says and what has to hold (`plan_content`), what it keeps at a length
(`plan_costs`), its text (`plan_text`), and its frames and pictures (`plan_views`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import PrivateAttr

from moa_search.errors import ConfigError, PlanFormatError
from moa_search.formats import plan_views
from moa_search.formats.files import atomic_write, read_file
from moa_search.formats.patterns import (
    DensePattern,
    NativePattern,
    Pattern,
    SpanPattern,
    pattern_of,
)
from moa_search.formats.plan_content import PLAN_SCHEMAS
from moa_search.formats.plan_costs import PlanCosts
from moa_search.formats.plan_text import PlanText
from moa_search.formats.signature import ModelSignature
from moa_search.formats.tiers import PLAIN, Tier, wants_transform
from moa_search.formats.transforms import KeyTransforms
from moa_search.spans import SpanRule


class Plan(PlanCosts, PlanText):
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

    _key_transforms: KeyTransforms | None = PrivateAttr(default=None)

    # Frames and pictures, in a module of their own.
    by_length: ClassVar = plan_views.by_length
    cell_texts: ClassVar = plan_views.cell_texts
    diff: ClassVar = plan_views.diff
    kept_text: ClassVar = plan_views.kept_text
    plot_density: ClassVar = plan_views.plot_density
    plot_diff: ClassVar = plan_views.plot_diff
    plot_mask: ClassVar = plan_views.plot_mask
    plot_spans: ClassVar = plan_views.plot_spans
    rule_text: ClassVar = plan_views.rule_text
    shares: ClassVar = plan_views.shares
    to_frame: ClassVar = plan_views.to_frame
    _repr_html_: ClassVar = plan_views.to_html

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
                tuple(NativePattern() if native else pattern_of(*head) for head in zip(heads, stored, strict=True))
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
        plan = cls.loads(read_file(path), source=str(path))
        if plan.transforms is not None:
            folder = Path(path).parent
            if not (folder / KeyTransforms.file_name(plan.transforms)).exists():
                folder = Path(path).resolve().parent  # the path may be a link to the plan
            plan._key_transforms = KeyTransforms.load(folder, plan.transforms, plan.model, str(path))
        return plan

    @classmethod
    def of(cls, plan: PlanLike, name: str = "plan") -> Plan:
        """The plan that an argument stands for, wherever a function asks for one.

        Args:
            plan: A Plan, a plan file, or a plan's content, as text or as ``json.load`` gives it (``config.moa_plan``).
            name: Of the argument, for errors.

        Raises:
            ConfigError: There is no such file, or it is something else.
            PlanVersionError: The schema is of another version.
            PlanFormatError: The file or content is no valid plan.
        """
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, str) and plan.lstrip().startswith("{"):
            return cls.loads(plan, source=name)
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
