"""Options of ``moa-search`` and its other commands."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moa_search.errors import ConfigError
from moa_search.options.base import (
    Count,
    Lengths,
    ListOrNone,
    NotNegative,
    Options,
    Positive,
    Several,
    Share,
    Tokens,
    as_list,
)
from moa_search.options.groups import (
    BudgetOptions,
    Criterion,
    DensitiesOptions,
    Device,
    HeldOutLengths,
    HeldOutOptions,
    HeldOutSamples,
    LoadingOptions,
    ModelOptions,
    Searcher,
    SharesOptions,
    TrustRemoteCode,
)


def read_weights(value: Any) -> Any:
    """``LENGTH=WEIGHT``, such as ``2048=2``, or a mapping, as a weight by length."""
    if isinstance(value, Mapping):
        return value
    weights: dict[int, float] = {}
    for text in map(str, as_list(value)):
        form = re.fullmatch(r"(\d+)=(\d*\.?\d+)", text.strip())
        if not form:
            raise ConfigError(f"length_weights: {text!r} isn't of the form LENGTH=WEIGHT, such as 2048=2")
        length = int(form[1])
        if length in weights:
            raise ConfigError(f"length_weights: {text!r} weighs {length} a second time; keep one of them")
        weights[length] = float(form[2])
    return weights


def read_floors(value: Any) -> Any:
    """``LAYER=DENSITY`` and ``FIRST-LAST=DENSITY``, also as a mapping, as texts."""
    return (
        [f"{layers}={density}" for layers, density in value.items()] if isinstance(value, Mapping) else as_list(value)
    )


Anchor = Annotated[
    Literal["position", "prompt"],
    Field(description="Where a rule is evaluated: at every query's own position, or once at the total length."),
]
TimeLimit = Annotated[
    Positive, Field(description="Seconds for each solve; when they run out, the best plan found is kept with its gap.")
]


class SearchOptions(BudgetOptions):
    """Search."""

    criterion: Criterion = "signed"
    """How effects on the loss are summed up; signed did best on held-out data, elementwise is MoA's own, recall needs
    no gradient."""
    searcher: Searcher = "exact"
    """exact chooses a rule per KV head. Baselines: moa searches as MoA does, duo makes heads dense or short as
    DuoAttention does, per-layer has one rule a layer, recall keeps most attention mass, uniform has one rule for
    all, as StreamingLLM does. Under a budget in bytes also: spans chooses no bits, one-bits the same for all heads,
    uniform-bits one rule and bits for all, layer-bits drops no token and chooses bits per layer, dense-bits one for
    all."""
    anchor: Anchor = "position"
    rules_per_layer: Annotated[int, Field(ge=1, le=2)] | None = None
    """Most different rules in one layer, 1 or 2; any number by default."""
    groups: Annotated[int, Field(ge=1)] | None = None
    """With searcher exact: most groups of equally many KV heads that have one rule each, for vLLM, which then holds no
    more than is attended; the plan comes without a front."""
    length_weights: Annotated[dict[int, NotNegative], BeforeValidator(read_weights)] = Field(default={})
    """Weights of the losses in the chosen plan by length, such as 1024=1 2048=3; equal by default."""
    predict_lengths: Annotated[Sequence[Tokens] | None, ListOrNone] = None
    """Lengths never profiled to predict losses at, by extrapolation; they count like profiled ones. By default exact
    looks ahead to twice the longest profiled length, where a budget holds there."""
    robust: NotNegative = 0.0
    """Standard errors to add to every loss, so that noise isn't mistaken for a bargain."""
    min_span: Count | None = None
    """Smallest span in tokens of any head."""
    layer_floor: Annotated[Sequence[str], BeforeValidator(read_floors)] = ()
    """Smallest density of every head of some layers, such as 0-1=1.0 29=0.5."""
    time_limit_s: TimeLimit = 60.0
    front_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps of the lattice of weights over the lengths; 0 for the chosen plan alone, by default as many as take about
    15 solves."""


with warnings.catch_warnings():
    # `validate` is also a method of pydantic's models, deprecated and not used here.
    warnings.filterwarnings("ignore", message='Field name "validate"')

    class FrontOptions(SearchOptions, SharesOptions):
        """Result."""

        validate: str | None = None  # type: ignore[assignment]
        """Model to try every plan of the front on, at an unseen, longer length; the best becomes plan.json (moa-search
        validate has more options)."""
        output: str | None = None
        """Folder to write plan.json and front/ to; what an older search left there is replaced."""
        overwrite: bool = False
        """Replace an older plan.json in the output folder even where it was tuned, or chosen on held-out samples."""
        trust_remote_code: TrustRemoteCode = False

    class CompareOptions(BudgetOptions):
        """Comparison."""

        searchers: Several[Searcher] = ()
        """Which to compare; by default exact, moa, duo, per-layer, recall and uniform, and where bits are chosen, too,
        spans, one-bits, uniform-bits, layer-bits and dense-bits."""
        criterion: Criterion = "signed"
        """What all plans are judged by, and chosen by where a searcher has no criterion of its own."""
        anchor: Anchor = "position"
        time_limit_s: TimeLimit = 60.0
        validate: str | None = None  # type: ignore[assignment]
        """Model to measure the true loss of every plan with, on held-out samples."""
        lengths: HeldOutLengths = None
        samples: HeldOutSamples = 16
        output: str | None = None
        """Folder to write every plan, compare.csv and measured losses to."""
        trust_remote_code: TrustRemoteCode = False


class ValidationOptions(HeldOutOptions):
    """Held-out samples."""

    lengths: Lengths = None
    """Tokens per sample, answer included; by default twice the longest length that the plans were made for, or the
    model's context where that is shorter."""
    answers: Literal["model", "dataset"] = "dataset"
    """dataset measures the loss of the reference answers; model that of the dense model's own right ones."""
    chat: Literal["auto", "never"] = "never"
    """never leaves prompts plain; auto puts them into the tokenizer's chat template where it has one."""


class ValidateOptions(ValidationOptions, ModelOptions):
    """Validation."""

    model: Any
    """A Hub id, a model folder, a .gguf file, or "demo"."""


class TuneOptions(DensitiesOptions, HeldOutOptions, LoadingOptions):
    """Study."""

    model: str
    """A Hub id, a model folder, a .gguf file, or "demo"."""
    output: str
    """Folder for plan.json, the study and what was measured."""
    densities: Several[Share] = ()
    """Smallest and largest density, instead of one: the density is searched too, and loss and density are both
    minimised."""
    criteria: Several[Criterion] = ("signed", "squared")
    """Criteria to choose from, the default first."""
    trials: Count = 60
    """Plans to try, by all workers together."""
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    """Optuna's sampler; gp needs scipy."""
    storage: str | None = None
    """Where the study is kept; a journal file in the output folder by default, or sqlite:///FILE for one worker;
    postgresql://USER@HOST/NAME for many machines, each of which runs this command."""
    study: str = "tune"
    """Name of the study in its storage."""
    workers: Count = 1
    """Processes on this machine, each with its own copy of the model."""
    devices: Several[str] = ()
    """Given to the workers in turn, such as cuda:0 cuda:1."""
    seed: int = 0
    """Random seed of samples and sampler."""
    time_limit_s: TimeLimit = 20.0


class HardwareOptions(Options):
    """Device."""

    name: str | None = None
    """What plans and tables call the device; by default its own name."""
    device: Device = "auto"
    tile_query: Count = 128
    """Rows of queries that the attention kernel handles together; not measured."""
    tile_key: Count = 128
    """Keys that the attention kernel reads together; not measured."""
