"""Speed and memory of plans."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from moa_search.api.common import model_and_tokenizer, require_plans_fit, require_writable_folder
from moa_search.api.variants import named_plans
from moa_search.options import ThroughputOptions, takes

if TYPE_CHECKING:
    from moa_search.evaluation.throughput import Throughput


@takes(ThroughputOptions, may_lack_first=True)
def measure_throughput(model: str | tuple[Any, Any] | None, options: ThroughputOptions) -> Throughput:
    """Time prefill and decoding, and weigh memory, dense and under plans, side by side in one run.

    Args:
        model: A Hub id, a model folder, a .gguf file, or "demo".
        options: As keywords, each described in `ThroughputOptions`.

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

    if (model is None) == (options.random_weights is None):
        raise ConfigError("give --model or --random-weights, one of them")
    if options.layers is not None and options.random_weights is None:
        raise ConfigError("layers: only with --random-weights")
    batches = _batches(options.batch)
    require_writable_folder(options.output)
    plans = named_plans(options.plan, [_made_up(share) for share in options.density])
    if {"plan", "plan-static"} & set(options.ways) and not plans and not options.density:
        raise ConfigError("ways: plan needs --plan or --density; for dense alone give --ways dense dense-static")
    if options.random_weights is not None:
        from moa_search.modeling.loading import random_model

        network = random_model(options.random_weights, layers=options.layers, seed=options.seed, **options.loading)
    else:
        assert model is not None
        network, _ = model_and_tokenizer(model, **options.loading)
    _require_limit(network, batches, options.memory_limit_gib)
    require_plans_fit(plans, network)
    signature = ModelSignature.of(network.config)
    native = [layer for layer, window in enumerate(native_windows(network.config)) if window is not None]
    for share in options.density:
        plans[_made_up(share)] = made_up_plan(signature, share, native_layers=native)
    require_context(network.config, max(options.lengths) + 1 + UNTIMED_STEPS + options.decode_tokens)
    return measure(
        network,
        make_ways(options.ways, plans),
        lengths=options.lengths,
        batches=batches,
        decode_tokens=options.decode_tokens,
        repetitions=options.repetitions,
        prefill_chunk=options.prefill_chunk,
        limit_bytes=None if options.memory_limit_gib is None else round(options.memory_limit_gib * 2**30),
        seed=options.seed,
        keep=None if options.output is None else partial(_save, output=options.output),
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
