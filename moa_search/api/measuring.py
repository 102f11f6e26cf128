"""Speed and memory of plans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from moa_search.api.common import (
    Dtype,
    model_and_tokenizer,
    require_lengths,
    require_plans_fit,
    require_positive,
    require_writable_folder,
)
from moa_search.api.variants import named_plans

if TYPE_CHECKING:
    from moa_search.evaluation.throughput import Throughput
    from moa_search.formats import PlanLike

__all__ = ["WayKind", "measure_throughput"]

WayKind = Literal["dense", "dense-static", "plan", "plan-static"]


def measure_throughput(
    model: str | tuple[Any, Any] | None = None,
    *,
    random_weights: str | None = None,
    layers: int | None = None,
    plan: Sequence[str | PlanLike] = (),
    density: Sequence[float] = (),
    ways: Sequence[WayKind] = ("dense", "dense-static", "plan", "plan-static"),
    lengths: Sequence[int] = (1024,),
    batch: Sequence[str] = ("1",),
    decode_tokens: int = 32,
    repetitions: int = 5,
    prefill_chunk: int | None = None,
    memory_limit_gib: float | None = None,
    output: str | None = None,
    dtype: Dtype = "auto",
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Throughput:
    """Time prefill and decoding, and weigh memory, dense and under plans, side by side in one run.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo"; in Python also what load_model returned.
        random_weights: In place of a model, a configuration whose weights are drawn at random: a .json file, a folder
            or a Hub id.
        layers: With random_weights, so many layers instead of the configuration's, for shapes that don't fit.
        plan: Plan files; in Python also Plans or their contents.
        density: Make up a plan that keeps this share of the KV cache, for a model without a profile: some heads dense,
            the others a sixteenth of the context.
        ways: dense (SDPA, DynamicCache), dense-static (SDPA, StaticCache, compiled decoding), plan, and plan-static
            (a cache of fixed size, compiled decoding).
        lengths: Tokens per prompt.
        batch: Samples together, or "largest": the largest batch that fits, found for each way.
        decode_tokens: Timed decoding steps, after the prefill's token and four untimed ones.
        repetitions: Timed runs of each way, length and batch, in turns.
        prefill_chunk: Tokens that a prefill handles at once; by default what transformers and the plan do.
        memory_limit_gib: For "largest", most memory in use, weights included; on a CPU required.
        output: Folder for throughput.csv (every run), summary.csv, gains.csv, facts.json and throughput.png, written
            again after each length.
        dtype: Type of the weights, as for moa-profile.
        device: Such as cpu or cuda:0; auto takes the first GPU if there is one.
        seed: Of the prompts and of random weights.
        trust_remote_code: Run the code that a model brings along; false refuses such a model.

    Returns:
        Every run, how exact each plan was, and what the numbers depend on;
        `moa_search.evaluation.throughput.summarise_throughput` gives medians.

    Raises:
        MoAError: The model, a plan or an option can't be used; see `moa_search.errors`.
    """
    from moa_search.errors import ConfigError
    from moa_search.evaluation.throughput import made_up_plan, make_ways, measure
    from moa_search.evaluation.throughput.running import UNTIMED_STEPS
    from moa_search.formats import ModelSignature
    from moa_search.modeling.support import native_windows, require_context

    if (model is None) == (random_weights is None):
        raise ConfigError("give --model or --random-weights, one of them")
    if layers is not None and random_weights is None:
        raise ConfigError("layers: only with --random-weights")
    require_lengths(lengths=lengths)
    require_positive(lengths=min(lengths, default=0), decode_tokens=decode_tokens, repetitions=repetitions)
    for name, value in (("layers", layers), ("prefill_chunk", prefill_chunk), ("memory_limit_gib", memory_limit_gib)):
        if value is not None:
            require_positive(**{name: value})
    batches = _batches(batch)
    require_writable_folder(output)
    plans = named_plans(plan, [_made_up(share) for share in density])
    if {"plan", "plan-static"} & set(ways) and not plans and not density:
        raise ConfigError("ways: plan needs --plan or --density; for dense alone give --ways dense dense-static")
    if random_weights is not None:
        from moa_search.modeling.loading import random_model

        network = random_model(
            random_weights, layers=layers, dtype=dtype, device=device, seed=seed, trust_remote_code=trust_remote_code
        )
    else:
        assert model is not None
        network, _ = model_and_tokenizer(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _require_limit(network, batches, memory_limit_gib)
    require_plans_fit(plans, network)
    signature = ModelSignature.of(network.config)
    native = [layer for layer, window in enumerate(native_windows(network.config)) if window is not None]
    for share in density:
        plans[_made_up(share)] = made_up_plan(signature, share, native_layers=native)
    require_context(network.config, max(lengths) + 1 + UNTIMED_STEPS + decode_tokens)
    return measure(
        network,
        make_ways(ways, plans),
        lengths=lengths,
        batches=batches,
        decode_tokens=decode_tokens,
        repetitions=repetitions,
        prefill_chunk=prefill_chunk,
        limit_bytes=None if memory_limit_gib is None else round(memory_limit_gib * 2**30),
        seed=seed,
        keep=None if output is None else partial(_save, output=output),
    )


def _made_up(density: float) -> str:
    """What a plan without a profile is called."""
    return f"made up {density:.15g}"


def _batches(batch: Sequence[str]) -> list[int | str]:
    """Batch sizes as numbers, "largest" as it is."""
    from moa_search.errors import ConfigError
    from moa_search.evaluation.throughput.measuring import LARGEST

    read: list[int | str] = []
    for entry in batch:
        if entry != LARGEST and not (str(entry).isdecimal() and int(entry) > 0):
            raise ConfigError(f"batch: {str(entry)!r} is neither a whole number over 0 nor {LARGEST}")
        read.append(entry if entry == LARGEST else int(entry))
    if not read:
        raise ConfigError("batch: give at least one")
    return read


def _require_limit(network: Any, batches: Sequence[int | str], memory_limit_gib: float | None) -> None:
    """Only a GPU says by itself that its memory is full."""
    from moa_search.errors import ConfigError
    from moa_search.evaluation.throughput.measuring import LARGEST
    from moa_search.evaluation.throughput.memory import can_measure

    if LARGEST not in batches or network.device.type == "cuda":
        return
    if not can_measure(network.device):
        raise ConfigError(f"batch: {LARGEST} can't be found here, memory in use can be read on Linux and on a GPU only")
    if memory_limit_gib is None:
        raise ConfigError(f"batch: {LARGEST} on a CPU needs --memory-limit-gib")


def _save(found: Throughput, output: str) -> None:
    import json
    from pathlib import Path

    from moa_search.evaluation.throughput import split_gains, summarise_throughput
    from moa_search.formats.files import atomic_write, write_csv
    from moa_search.inspection.plots import save_throughput_plot

    folder = Path(output)
    summary = summarise_throughput(found.runs)
    for name, table in (("throughput", found.runs), ("summary", summary), ("gains", split_gains(summary))):
        write_csv(table, folder / f"{name}.csv")
    facts = found.facts | {"gates": [vars(gate) for gate in found.gates]}
    with atomic_write(folder / "facts.json") as file:
        file.write(json.dumps(facts, indent=2).encode() + b"\n")
    save_throughput_plot(summary, found.facts, folder / "throughput.png")
