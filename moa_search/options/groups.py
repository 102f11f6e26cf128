"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moa_search.options.base import Count, Lengths, ListOrNone, Options, Several, Share, as_list

Criterion = Literal["squared", "root_squared", "signed", "absolute", "elementwise", "recall"]
Searcher = Literal[
    "exact",
    "moa",
    "duo",
    "per-layer",
    "recall",
    "uniform",
    "spans",
    "one-bits",
    "uniform-bits",
    "layer-bits",
    "dense-bits",
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


Device = Annotated[str, Field(description="Such as cpu or cuda:0; auto takes the first GPU if there is one.")]
HeldOutLengths = Annotated[
    Lengths,
    Field(description="Tokens per held-out sample, answer included; by default the profiled lengths."),
]
HeldOutSamples = Annotated[Count, Field(description="Held-out samples per length.")]


def _none_is_empty(value: Any) -> Any:
    given = as_list(value)
    return [] if given == ["none"] else given


Baselines = Annotated[Several[str], BeforeValidator(_none_is_empty)]
"""``none`` alone stands for an empty list, which a command line can't give."""

TrustRemoteCode = Annotated[
    bool, Field(description="Run the code that a model brings along; false refuses such a model.")
]


class LoadingOptions(Options):
    """Model."""

    dtype: Dtype = "auto"
    """Type of the weights; auto is the checkpoint's own on a GPU, and on a CPU bfloat16 where it is native."""
    trust_remote_code: TrustRemoteCode = False

    @property
    def loading(self) -> dict[str, Any]:
        """What `load_model` is told."""
        names = ("dtype", "device", "trust_remote_code")
        return {name: getattr(self, name) for name in names if name in type(self).model_fields}


class ModelOptions(LoadingOptions):
    """Model."""

    device: Device = "auto"


class PlanOptions(Options):
    """Plans and baselines."""

    plan: Several[Any] = ()
    """Plan files."""
    baselines: Baselines = ("dense", "uniform")
    """dense, and uniform: one span for all heads with as much memory as the plan; none for plans alone."""


class HeldOutOptions(Options):
    """Held-out samples."""

    sources: Several[str] = ("passkey", "copy")
    """What held-out samples are drawn from, in turn, as for moa-profile; texts and records are those that calibration
    never uses."""
    lengths: HeldOutLengths = None
    samples: HeldOutSamples = 16
    seed: int = 0
    """Random seed for drawing samples."""


class BudgetOptions(Options):
    """Budgets."""

    density: Several[Share] = ()
    """Largest share of the KV cache to keep: one for all lengths, or one for each; 0.25 if no other budget is given."""
    kv_share: Several[Share] = ()
    """Largest share of a 16-bit KV cache's bytes to keep, likewise; from a profile with tiers, the bits of keys and
    values are chosen along with the spans."""
    tiers: Annotated[Sequence[int] | None, ListOrNone] = None
    """Bits that keys and values may be stored in, such as 16 8 4; by default all that the profile knows where a budget
    is in bytes, else 16."""
    budget_lengths: Lengths = None
    """Lengths in tokens that the densities hold at, profiled or not; by default the profiled ones and, with the last
    density, the predicted ones and the model's full context."""
    budget: Several[str] = ()
    """Budgets in other units, also beside a density: tokens=512@8192, kv=2GiB@32768x8, memory=24GiB@32768x4,
    decode=12ms@32768x8 or prefill=900ms@32768."""
    hardware: Any = None
    """Device that times are of: a100-80g, h100-sxm, h200, l40s, rtx4090, or a .yaml from moa-search hardware."""
    weights_bytes: Count | None = None
    """Size of the model's weights, for budgets that count them; by default as profiled."""


class DensitiesOptions(BudgetOptions):
    """Budgets."""

    densities: Several[Share] = ()
    """Several densities instead of one: the best plan for each, and the one where keeping more stops paying."""


class SharesOptions(DensitiesOptions):
    """Budgets."""

    kv_shares: Several[Share] = ()
    """Several shares of the bytes instead of one, likewise."""
