"""Cells of ways, lengths and batches, timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import transformers

from moa_search.errors import ConfigError
from moa_search.evaluation.compare import densities
from moa_search.evaluation.machine import device_name
from moa_search.evaluation.throughput.batches import MOST_SAMPLES, Probe, largest_batch
from moa_search.evaluation.throughput.gate import Gate, verify
from moa_search.evaluation.throughput.memory import old_objects_kept
from moa_search.evaluation.throughput.running import Run, run_once
from moa_search.evaluation.throughput.ways import Way, forget_compiled, generating_on
from moa_search.modeling.private import attention_of
from moa_search.modeling.text import dtype_name, text_config
from moa_search.progress import progress
from moa_search.runtime.kernels import attends_by
from moa_search.version import __version__

LARGEST = "largest"
"""Stands for the largest batch that fits."""

COMPILED_SHARE = 16
"""Where a compiled way's batch fits only uncompiled, one in so many samples is given up at a time."""


@dataclass(frozen=True)
class Throughput:
    """What a measurement found.

    Attributes:
        runs: One row per way, length, batch and repetition; see `measure`.
        gates: How exact each plan is.
        facts: Device, versions and settings that the numbers depend on.
    """

    runs: pd.DataFrame
    gates: tuple[Gate, ...]
    facts: dict[str, str]


@dataclass(frozen=True)
class _Cell:
    way: Way
    batch: int
    is_largest: bool = False


@torch.no_grad()
def measure(
    model: Any,
    ways: Sequence[Way],
    *,
    lengths: Sequence[int],
    batches: Sequence[int | str],
    decode_tokens: int,
    repetitions: int,
    prefill_chunk: int | None = None,
    limit_bytes: int | None = None,
    seed: int = 0,
    keep: Callable[[Throughput], None] | None = None,
) -> Throughput:
    """Time every way at every length and batch.

    First every plan passes its gate. Then, length by length, each cell runs once untimed (where compiled code is
    compiled), and then all cells in turns, in another order each time, so that a device that slows down slows all.

    Args:
        model: A dense model in eval mode.
        ways: How to run it.
        lengths: Tokens per prompt.
        batches: Samples together; `LARGEST` finds each way's largest, and also runs the plans at the largest batches of
            the dense ways, which splits the gain (`split_gains`).
        decode_tokens: As for `run_once`.
        repetitions: Timed runs of each cell.
        prefill_chunk: Tokens that a prefill handles at once; None for what transformers and the plan do by themselves.
        limit_bytes: Bound for `LARGEST`; see `Probe`.
        seed: Of the prompts, which are random tokens.
        keep: Given what was found so far after each length, so that a run that fails later isn't lost.

    Returns:
        Rows with ``variant``, ``kind``, ``density``, ``attention_density``, ``length``, ``batch``, ``is_largest``,
        ``repetition`` and the attributes of `moa_search.evaluation.throughput.running.Run`.

    Raises:
        VerificationError: A plan computes something else than it says; nothing has been timed.
        ConfigError: Not even one sample fits.
    """
    gates = tuple(verify(model, way, seed) for way in ways if way.plan is not None)
    rows: list[dict[str, Any]] = []
    lengths = list(dict.fromkeys(lengths))
    facts = _facts(model) | {"decode_tokens": str(decode_tokens), "prefill_chunk": str(prefill_chunk)}
    bar = progress(what="Timing", unit="round", total=len(lengths) * (repetitions + 1))
    with bar, old_objects_kept(), generating_on(model, prefill_chunk=prefill_chunk):
        for length in lengths:
            forget_compiled(model)  # graphs of another length only take memory
            cells = _cells(model, ways, length, batches, decode_tokens, limit_bytes)
            prompts = _prompts(model, length, max(cell.batch for cell in cells), seed)
            for repetition in range(-1, repetitions):
                shift = max(repetition, 0) % len(cells)
                for cell in cells[shift:] + cells[:shift]:
                    run = _run(model, cell, prompts, decode_tokens)
                    if repetition >= 0:
                        rows.append({**_keys(cell, length), "repetition": repetition, **vars(run)})
                bar.update()
            if keep is not None:
                keep(Throughput(pd.DataFrame(rows), gates, facts))
    return Throughput(pd.DataFrame(rows), gates, facts)


def _cells(
    model: Any,
    ways: Sequence[Way],
    length: int,
    batches: Sequence[int | str],
    decode_tokens: int,
    limit_bytes: int | None,
) -> list[_Cell]:
    """What to run at one length, each way and batch once."""
    cells = [_Cell(way, batch) for batch in batches if isinstance(batch, int) for way in ways]
    if LARGEST in batches:
        most = {way.name + way.kind: _largest(model, way, length, decode_tokens, limit_bytes) for way in ways}
        found = [_Cell(way, most[way.name + way.kind], is_largest=True) for way in ways]
        of_dense = [cell.batch for cell in found if cell.way.plan is None]
        beside = [
            _Cell(cell.way, batch) for cell in found for batch in of_dense if cell.way.plan and batch <= cell.batch
        ]
        cells = found + beside + cells
    unique: dict[tuple[str, str, int], _Cell] = {}
    for cell in cells:  # the largest come first, and stay
        unique.setdefault((cell.way.name, cell.way.kind, cell.batch), cell)
    return list(unique.values())


def _largest(model: Any, way: Way, length: int, decode_tokens: int, limit_bytes: int | None) -> int:
    probe = Probe(model, way, length, decode_tokens, limit_bytes)
    found = largest_batch(probe, MOST_SAMPLES)
    while found and way.is_compiled and not probe(found, compiled=True):  # compiled graphs take memory, too
        forget_compiled(model)
        found -= max(1, found // COMPILED_SHARE)
    if not found:
        raise ConfigError(f"length {length}: not even one sample of {way.name} fits; give shorter lengths")
    return found


def _run(model: Any, cell: _Cell, prompts: torch.Tensor, decode_tokens: int) -> Run:
    """One run; where the graphs of a compiled way leave too little memory to another's largest batch, without them.

    They are made again when that way's turn comes, in steps that aren't timed.
    """
    try:
        return run_once(model, cell.way, prompts[: cell.batch], decode_tokens)
    except torch.OutOfMemoryError:
        forget_compiled(model)
    return run_once(model, cell.way, prompts[: cell.batch], decode_tokens)


def _prompts(model: Any, length: int, batch: int, seed: int) -> torch.Tensor:
    vocabulary = text_config(model.config).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


def _keys(cell: _Cell, length: int) -> dict[str, Any]:
    return {
        "variant": cell.way.name,
        "kind": cell.way.kind,
        **densities(cell.way.plan_at(length), length),
        "length": length,
        "batch": cell.batch,
        "is_largest": cell.is_largest,
    }


def _facts(model: Any) -> dict[str, str]:
    """What the numbers depend on beside the cells."""
    device = model.device
    gpu = device.type == "cuda"
    text = text_config(model.config)
    facts = {
        "device": device_name(device),
        "model": f"{text.model_type}, {sum(p.numel() for p in model.parameters()) / 1e6:.4g}M parameters, "
        f"{text.num_hidden_layers} layers",
        "dtype": dtype_name(model),
        "dense_attention": str(attention_of(text)),
        "plan_attention": attends_by(model),
        "weights_bytes": str(sum(p.nbytes for p in model.parameters())),
        "moa_search": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return facts | ({"cuda": str(torch.version.cuda)} if gpu else {"threads": str(torch.get_num_threads())})
