"""The page of a repository with plans, written from the plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from moa_search.errors import PlanFormatError
from moa_search.formats.files import one_line
from moa_search.version import __version__

if TYPE_CHECKING:
    from moa_search.formats.plan import Plan

BEGIN, END = "<!-- moa-search: written from the plans -->", "<!-- moa-search: end -->"
"""Around what is written anew with every push."""

MEASURED = "Mean loss in nats per answer token on held-out samples, measured, with a 95 % interval."
TAGS = ("kv-cache-plan", "kv-cache", "long-context")
NORMAL_95 = 1.96
"""Standard errors on each side of a mean that make a 95 % interval."""


def write_card(
    plans: Mapping[str, Plan], repo: str, *, base_model: str | None, license: str | None, old: str | None = None
) -> str:
    """The page: which model, what each plan keeps and was measured to lose, and how to use one.

    Args:
        plans: By name; at least one.
        repo: Where they are.
        base_model: Hub id of their model; None keeps what ``old`` says.
        license: As on the hub; None keeps what ``old`` says.
        old: The page so far, of which only what is between `BEGIN` and `END` is replaced.

    Raises:
        PlanFormatError: The head of ``old`` isn't YAML.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.constants import REPOCARD_NAME

    text = ""
    data: Any = ModelCardData()
    if old is not None:
        try:
            card = ModelCard(old)
        except (ValueError, yaml.YAMLError) as error:
            raise PlanFormatError(f"{repo}: the head of its {REPOCARD_NAME} is no YAML ({one_line(error)})") from None
        text, data = card.text, card.data
    data.library_name = "moa-search"
    data.base_model = base_model or data.base_model
    data.license = license or data.license
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS]))
    named = data.base_model[0] if isinstance(data.base_model, list) else data.base_model
    written = f"{BEGIN}\n{_body(plans, repo, named, data.license)}\n{END}"
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    text = f"{before}{written}{after}" if begun and ended else f"{text.rstrip()}\n\n{written}\n".lstrip("\n")
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def _body(plans: Mapping[str, Plan], repo: str, base_model: str | None, license: Any) -> str:
    first = next(iter(plans.values()))
    model = first.model
    title = base_model or f"a {model.architecture} of {model.num_hidden_layers} layers"
    kept = [
        (f"`{name}`", entry.length, f"{entry.density:.1%}", f"{plan.share(entry.length):.1%}")
        for name, plan in plans.items()
        for entry in plan.predicted
    ]
    lost = [
        (
            f"`{name}`",
            entry.length,
            entry.samples,
            _interval(entry.loss, entry.loss_error),
            "" if entry.dense_loss is None else f"{entry.dense_loss:.3f}",
        )
        for name, plan in plans.items()
        for entry in plan.validated
    ]
    parts = [
        f"# KV cache plans for {title}",
        f"For every layer and KV head, how much of the KV cache it keeps, found by moa-search for {title} "
        f"({model.architecture}, {model.num_hidden_layers} layers, {model.num_key_value_heads} KV heads). A plan is "
        "refused by models whose attention differs; it fits adapters of its model.",
        "```python\n"
        "from moa_search import Plan, apply_plan, load_model\n\n"
        f'model, tokenizer = load_model("{base_model or "MODEL"}")\n'
        f'apply_plan(model, Plan.from_pretrained("{repo}", "{next(iter(plans))}"))\n'
        'inputs = tokenizer("Hello", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n"
        "```",
        "## What they keep\n\n"
        + _table(("plan", "tokens", "tokens of the KV cache kept", "bytes kept, of 16 bits"), kept)
        if kept
        else "",
        f"## What they lose\n\n{MEASURED}\n\n"
        + _table(("plan", "tokens", "samples", "loss under the plan", "dense"), lost)
        if lost
        else "## What they lose\n\nNot measured yet: `moa-search validate`, or `moa-eval`, measures it.",
        "## How they were made\n\n" + "\n".join(f"- `{name}`: {_origin(plan)}" for name, plan in plans.items()),
        f"Licence: {license}." if license else "Whoever published these plans states no licence.",
    ]
    return "\n\n".join(part for part in parts if part)


def _origin(plan: Plan) -> str:
    origin = plan.provenance
    if origin is None:
        return f"by hand, moa-search {plan.library_version}"
    facts = {
        "searcher": origin.searcher,
        "criterion": origin.criterion,
        "proven gap": None if origin.gap is None else f"{origin.gap:.2%}",
        "profile": origin.profile and origin.profile[: len("sha256:") + 12],
        "moa-search": plan.library_version or __version__,
    }
    return ", ".join(f"{name} {_cell(value)}" for name, value in facts.items() if value is not None)


def _interval(loss: float, error: float | None) -> str:
    if error is None:
        return f"{loss:.3f}"
    return f"{loss:.3f} [{loss - NORMAL_95 * error:.3f}, {loss + NORMAL_95 * error:.3f}]"


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    return one_line(value).replace("|", "\\|").replace("<", "&lt;")
