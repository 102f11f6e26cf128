"""A plan as JSON text: small, diffable, with a checksum of all of it."""

from __future__ import annotations

import json
from typing import Any, Self

from pydantic import ValidationError

from moa_search.errors import PlanFormatError, PlanVersionError
from moa_search.formats.files import canonical_json, describe_invalid, parse_plan_json, require_schema, sha256_of
from moa_search.formats.patterns import SpanPattern
from moa_search.formats.plan_content import PLAN_SCHEMAS, PlanContent
from moa_search.formats.provenance import Budget, LengthMetrics, Provenance, Validation
from moa_search.formats.signature import ModelSignature


class PlanText(PlanContent):
    """Writing a plan's text, reading it, and hashes of what it says."""

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

    @classmethod
    def loads(cls, text: str | bytes, source: str = "plan") -> Self:
        """Read a plan from JSON text; ``source`` names it in errors.

        Raises:
            PlanVersionError: The schema is of another version.
            PlanFormatError: The text is no valid plan.
        """
        content = parse_plan_json(text, source)
        schema = content.get("schema") if isinstance(content, dict) else None
        require_schema(schema, PLAN_SCHEMAS, source, PlanFormatError, PlanVersionError)
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


def _checksum(content: dict[str, Any]) -> str:
    return sha256_of(canonical_json(content))


def _keys() -> set[str]:
    """Every key that may appear somewhere in the file."""
    kinds = (PlanContent, ModelSignature, Provenance, Budget, LengthMetrics, Validation, SpanPattern)
    return {field.alias or name for kind in kinds for name, field in kind.model_fields.items()}
