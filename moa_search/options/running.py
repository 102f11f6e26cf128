"""Options of ``moa-profile`` and ``moa-eval``: what runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from moa_search.options.base import Count, Lengths, ListOrNone, Options, Positive, Several, Share, Tokens
from moa_search.options.groups import Baselines, ModelOptions, PlanOptions, Searcher
from moa_search.spans import BLOCK_TOKENS, SINK_TOKENS

WayKind = Literal["dense", "dense-static", "plan", "plan-static"]
Depth = Annotated[float, Field(ge=0, le=1)]


class CalibrationOptions(Options):
    """Calibration samples."""

    lengths: Several[Tokens] = Field(default=(1024, 2048), min_length=1)
    """Tokens per calibration sample; one round of samples for each."""
    samples: Count = 16
    """Calibration samples per length."""
    sources: Several[str] = ("passkey", "copy")
    """What calibration samples are drawn from, in turn: passkey, multikey, question, copy, lines, lookup or tracking in
    built-in texts, passkey:FILE in other ones, or question-answer records or conversations from a JSONL, parquet or CSV
    file or a Hub dataset, such as data.jsonl?context=passage."""
    answers: Literal["model", "dataset"] = "model"
    """model supervises on the dense model's own greedy answers and leaves out wrong ones; dataset on the reference
    answers."""
    max_answer_tokens: Count = 64
    """Room for the model's own answers to free questions."""
    chat: Literal["auto", "never"] = "auto"
    """auto puts prompts into the tokenizer's chat template where it has one; never leaves them plain."""
    save_samples: str | None = None
    """Folder to save the calibration samples to as a data set; use it again as source samples:FOLDER."""
    seed: int = 0
    """Random seed for drawing samples."""


class ProfileOptions(CalibrationOptions, ModelOptions):
    """Profile."""

    output: str | None = None
    """File to write the profile to (.safetensors); FILE.partial beside it holds an unfinished run."""
    resume: bool = True
    """Continue from FILE.partial if a run was stopped; false starts anew."""
    sink: Annotated[int, Field(ge=0)] = SINK_TOKENS
    """First tokens that every head keeps."""
    block: Count = BLOCK_TOKENS
    """Smallest window in tokens, and the granularity of the small ones."""
    row_buckets: Count = 32
    """Equal slices of a sample's rows that are told apart."""
    checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more time."""
    impl: Literal["auto", "triton", "torch"] = "auto"
    """What computes the statistics: triton kernels, torch, or auto, which is Triton on GPUs."""
    device: str = "auto"
    """Such as cpu or cuda:0; auto takes the first GPU if there is one, under torchrun one per process."""
    device_map: str | None = None
    """auto spreads a model that is too large for one GPU over all of them (accelerate)."""
    tiers: Several[Count] = ()
    """Bits that keys and values may be stored in, such as 16 8 4 2; their influence is measured in the same passes. By
    default spans alone are measured."""
    transforms: Any = None
    """Profile of this model whose transforms to use, so that both can be merged; by default they are measured."""


class MergeOptions(Options):
    """Result."""

    output: str | None = None
    """File to write the pooled profile to (.safetensors)."""


class TaskOptions(Options):
    """Tasks."""

    tasks: Several[str] = ("passkey", "copy")
    """passkey, multikey, question, lines, lookup and turns (exact match), copy and tracking (token accuracy),
    perplexity; ruler or ruler:TASK for RULER's. Over data of yours: passkey:FILE, copy:FILE and so on hide and ask in
    its held-out texts; nll:SOURCE and ruler:FILE."""
    lengths: Several[Tokens] = Field(default=(1024,), min_length=1)
    """Tokens per item, answer included."""
    samples: Count = 10
    """Items per task and length, or per depth where depths are given."""
    answers: Literal["forced", "generated"] = "forced"
    """forced predicts each answer token given those before it and gives the answer's NLL too; generated decodes
    greedily, to the same exact matches."""
    depths: Several[Depth] = ()
    """Where the sought text stands, from 0, the start, to 1, the end, such as 0 0.5 1; by default spread evenly."""
    seed: int = 0
    """Random seed for drawing items."""


class EvalOptions(TaskOptions, PlanOptions, ModelOptions):
    """Result."""

    output: str | None = None
    """CSV file for the scores of every item."""


class ReportOptions(TaskOptions, PlanOptions, ModelOptions):
    """Report."""

    output: str
    """Folder for the page and its tables."""
    profile: Any = None
    """Profile to search further plans in, one for each searcher and budget."""
    searchers: Several[Searcher] = ("exact", "moa")
    """Which search: exact is ours, moa is MoA's; the first is compared with the others."""
    densities: Annotated[Sequence[Share] | None, ListOrNone] = None
    """Shares of the KV cache's tokens that searched plans keep at most; 0.5 0.25 0.125 without kv_shares."""
    kv_shares: Several[Share] = ()
    """Shares of a 16-bit KV cache's bytes that searched plans keep at most."""
    budget_lengths: Lengths = None
    """Lengths in tokens that densities and shares hold at, as for moa-search; those of the items make all plans of one
    keep as much at each."""
    lengths: Several[Tokens] = Field(default=(512, 1024, 2048, 4096), min_length=1)
    """Tokens per item, answer included."""
    samples: Several[Count] = Field(default=(20,), min_length=1)  # type: ignore[assignment]
    """Items per task and length (per depth where depths are given): one number for all lengths, or one for each."""
    against: Several[str] = ("dense",)
    """Variants that all others are compared with, item by item."""
    rivals: Several[str] = ()
    """What people would use instead: int8, int4 and int4-plain are dense caches as vLLM stores them;
    quantized-cache-4 and quantized-cache-2 are transformers', and kvpress's methods, such as snapkv@0.25 or
    kvzip@0.25, keep that share of the tokens; these two run under rivals_python."""
    rivals_python: str | None = None
    """Interpreter of an environment that has kvpress."""
    questions: Several[Literal["unknown", "known"]] = Field(default=("unknown", "known"), min_length=1)
    """Whether kvpress's methods know the question when they compress its context: unknown as where a prefix is used
    again, known as where it isn't; both are shown."""
    windows: bool = True
    """Whether to measure one constant window of each plan's average span, for the multiple of its effective context."""
    refine: Annotated[int, Field(ge=0)] = 0
    """How often to halve the gap between the last length that passes and the next, for dense and plans."""


class HarnessOptions(PlanOptions, ModelOptions):
    """Tasks."""

    tasks: Several[str]
    """Names of tasks, groups or tags, or task files."""
    include_path: str | None = None
    """Folder of task files of yours."""
    builtin: bool = False
    """Whether lm-eval's own tasks can be named too; most of them need the hub."""
    baselines: Baselines = ("dense",)
    """dense, and uniform: one span for all heads with as much memory as a plan at length; none for plans alone."""
    length: Tokens | None = None
    """Tokens at which uniform spans keep as much as a plan, and at which a plan is taken that is anchored at the
    prompt's end."""
    lengths: Several[Tokens] = ()
    """Tokens per item for tasks that make their own data, such as RULER's (their max_seq_lengths)."""
    limit: Count | None = None
    """Samples per task; all by default."""
    num_fewshot: int | None = None
    """Examples before each question; by default as the task says."""
    batch_size: Count = 1
    """Samples at once."""
    apply_chat_template: bool = False
    """Whether questions stand within the tokenizer's chat template."""
    output: str | None = None
    """Folder for results.csv, items.csv and every sample's log, samples/VARIANT/TASK.jsonl."""


class ThroughputOptions(ModelOptions):
    """Measurement."""

    random_weights: str | None = None
    """In place of a model, a configuration whose weights are drawn at random: a .json file, a folder or a Hub id."""
    layers: Count | None = None
    """With random_weights, so many layers instead of the configuration's, for shapes that don't fit."""
    plan: Several[Any] = ()
    """Plan files."""
    density: Several[Share] = ()
    """Make up a plan that keeps this share of the KV cache, for a model without a profile: some heads dense, the others
    a sixteenth of the context."""
    ways: Several[WayKind] = ("dense", "dense-static", "plan", "plan-static")
    """dense (SDPA, DynamicCache), dense-static (SDPA, StaticCache, compiled decoding), plan, and plan-static (a cache
    of fixed size, compiled decoding)."""
    lengths: Several[Tokens] = Field(default=(1024,), min_length=1)
    """Tokens per prompt."""
    batch: Several[str] = Field(default=("1",), min_length=1)
    """Samples together, or "largest": the largest batch that fits, found for each way."""
    decode_tokens: Count = 32
    """Timed decoding steps, after the prefill's token and four untimed ones."""
    repetitions: Count = 5
    """Timed runs of each way, length and batch, in turns."""
    prefill_chunk: Count | None = None
    """Tokens that a prefill handles at once; by default what transformers and the plan do."""
    memory_limit_gib: Positive | None = None
    """For "largest", most memory in use, weights included; on a CPU required."""
    output: str | None = None
    """Folder for throughput.csv (every run), summary.csv, gains.csv, facts.json and throughput.png, written again after
    each length."""
    seed: int = 0
    """Random seed of the prompts and of random weights."""
