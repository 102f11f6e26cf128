"""Options of ``moa-inspect``, and of reading and writing other tools' plans."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from moa_search.formats.foreign import PlanFormat
from moa_search.options.base import Count, Options, Positive, Several, Tokens, as_list
from moa_search.options.groups import Criterion, TrustRemoteCode


class ImportOptions(Options):
    """Plans of other tools."""

    model: Any = None
    """What other tools' plans were made for, since they don't say: a hub id, a folder, a plan or profile of the model,
    or layers=32,heads=32,kv_heads=8,head_dim=128 to look at it only; a plan of ours is checked."""
    fold_lengths: Several[Tokens] = ()
    """MoA only: context lengths in tokens between which the rule of a KV head has to keep what its query heads' rules
    keep; by default everywhere, which may take more memory."""
    threshold: float | None = None
    """DuoAttention only: heads with at least this score are dense (0.5 by default)."""
    sparsity: float | None = None
    """DuoAttention only: share of heads that aren't dense, instead of a threshold."""
    sink: int | None = None
    """DuoAttention only: first tokens kept by streaming heads; default from config.json."""
    recent: int | None = None
    """DuoAttention only: recent tokens kept by streaming heads; default from config.json."""
    bits: Several[int] = ()
    """Bits of all keys and of all values, such as 8 4, or of both, for formats that say none; for keys below 8 bits the
    model has to be a profile made with --tiers, or a plan from one."""
    trust_remote_code: TrustRemoteCode = False


class ExportOptions(Options):
    """Writing."""

    format: PlanFormat = "plan"
    """How to write it: plan as a plan of ours, moa as MoA's alphas and betas, duo as DuoAttention's folder; for
    tensorrt-llm, mlx, executorch or onnx as one window per layer, for modelopt or kvtuner as bits per layer, which hold
    less than a plan: what is lost is said."""
    reanchor: bool = False
    """With format moa: write rules that are evaluated at every position, too; MoA evaluates them once, at the total
    length, so that earlier tokens attend more."""
    window_length: Tokens | None = None
    """With an engine's format: context in tokens whose spans become the windows; by default the longest that the plan
    was made for."""


class PageOptions(Options):
    """Picture and page."""

    lengths: Several[Tokens] = ()
    """Context lengths in tokens to show; by default those that the plans were made for."""
    output: str | None = None
    """PNG file for a heat map."""
    html: str | None = None
    """File for a page with all there is to see; it needs no network."""


def read_tokens(value: Any) -> Any:
    """Numbers of tokens, ``32k`` for 32 times 1024."""

    def read(text: Any) -> Any:
        short = re.fullmatch(r"(\d+)k", text.strip().lower()) if isinstance(text, str) else None
        return 1024 * int(short[1]) if short else text

    return [read(entry) for entry in as_list(value)]


class MemoryOptions(Options):
    """Memory."""

    memory: bool = False
    """Show what weights, keys and values take, dense and under the plan, and what fits cards; nothing is loaded."""
    context: Annotated[Sequence[Tokens], BeforeValidator(read_tokens)] = ()
    """With memory: contexts in tokens, such as 8192 or 32k; by default those that the plan was made for."""
    batch: Count = 1
    """With memory: sequences at a time."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """With memory: what runs the plan; vllm holds in a group of heads what any of them attends."""
    weights_bytes: Count | None = None
    """With memory: size of the weights where it isn't what the model, or the profile, has at 16 bits each."""
    card: Several[Positive] = (24.0, 48.0, 80.0)
    """With memory: sizes of GPUs in GiB."""


class InspectPlanOptions(PageOptions, ImportOptions, ExportOptions, MemoryOptions):
    """Writing."""

    heads: Several[str] = ()
    """Heads whose masks the HTML page shows, as LAYER:HEAD such as 7:2; by default some from the longest to the
    shortest span."""
    front: str | None = None
    """Folder of moa-search whose front the HTML page shows; by default the one that the plan lies in."""
    profile: Any = None
    """Profile file that predicts what each layer loses, on the HTML page, and with format modelopt or kvtuner what
    these change; with memory it tells the size of the weights."""
    vllm: bool = False
    """Show how much of a dense cache vLLM holds under the plan, by the number of groups of KV heads."""
    save: str | None = None
    """File to write the plan to; for DuoAttention a folder."""


class InspectProfileOptions(PageOptions):
    """Profile."""

    criterion: Criterion = "signed"
    """How effects on the loss are summed up."""
    heads: Several[str] = ()
    """Heads whose losses the HTML page draws over the window, as LAYER:HEAD; by default those that lose most."""
    lengths: Several[Tokens] = ()
    """Profiled lengths in tokens to show; by default all."""
    output: str | None = None
    """PNG file for a heat map of what each head loses, at the longest length shown."""


class DiffOptions(PageOptions):
    """Difference."""

    output: str | None = None
    """PNG file for a heat map of the change at the longest length."""


class InspectPlansOptions(Options):
    """Plans."""

    lengths: Several[Tokens] = ()
    """Context lengths in tokens to show; by default those that the plans were made for."""
    revision: str | None = None
    """Branch, tag or commit of a repository of the hub; by default its main branch."""


class PushOptions(Options):
    """Repository."""

    repo: str
    """Repository of the Hugging Face hub, such as org/plans; made if it isn't there."""
    base_model: str | None = None
    """Hub id of the model that the plans are for, for the card."""
    license: str | None = None
    """Licence of the plans, such as apache-2.0, for the card."""
    private: bool = False
    """Whether a repository that is made is private."""
    revision: str | None = None
    """Branch to push to; by default the main one."""
    message: str | None = None
    """Message of the commit."""
    create_pr: bool = False
    """Open a pull request instead of committing."""


class FrontPageOptions(PageOptions):
    """Front."""

    output: str | None = None
    """PNG file for a chart of the plans' predicted losses."""
