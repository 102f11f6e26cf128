"""Every kernel beside its references: correctness first, then medians, in one run on one device.

Usage:
    python kernels/benchmarks/run.py --output FOLDER [--kernels prefill decode coded_decode influence pages]
        [--lengths 32768 131072]
    python kernels/benchmarks/run.py --tiny --output FOLDER    # the same code in Triton's interpreter, no GPU needed

Writes FOLDER/benchmarks.jsonl (one object per kernel, case and reference) and FOLDER/benchmarks.md, and prints the
table last. ``ratio`` is reference time over ours: above 1, ours is faster. A kernel that gives a wrong result is not
timed and makes the exit status 1. Under 8 minutes on an H200.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(ROOT), str(ROOT / "vllm-plugin")]
KERNELS = ("prefill", "decode", "coded_decode", "influence", "pages")
COLUMNS = ("kernel", "case", "ms", "reference", "reference_ms", "ratio")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per kernel, case and reference, as they are measured."""
    import torch
    from timing import Skipped, copy_bandwidth, measure, versions

    device = torch.device("cpu" if options.tiny else "cuda")
    known = {**versions(device), "date": time.strftime("%Y-%m-%d")}
    times: dict[tuple[str, str, str], float] = {}
    bandwidth = copy_bandwidth(device)
    yield {"kernel": "copy", "case": "device to device", "GB_per_s": round(bandwidth / 1e9, 1), **known}
    for kernel in options.kernels:
        for case in importlib.import_module(f"{kernel}_cases").cases(options.lengths, device):
            row = {"kernel": case.kernel, "case": case.name, "shapes": case.shapes, **case.facts, **known}
            try:
                case.verify()
            except Exception as error:
                traceback.print_exc()
                yield {**row, "wrong": f"{type(error).__name__}: {error}"}
                continue
            ms = measure(case.run, device)
            row |= {"ms": round(ms, 4)}
            if case.bytes:
                floor = case.bytes / bandwidth * 1e3
                row |= {"bytes": case.bytes, "reference": "copy bandwidth", "reference_ms": round(floor, 4)}
                yield {**row, "ratio": round(floor / ms, 3)}
            for name, make in case.references.items():
                same = (kernel, name, str(case.shapes))  # dense references don't depend on the plan
                try:
                    if same not in times:
                        times[same] = measure(make(), device)
                    reference_ms = times[same]
                except (Skipped, torch.OutOfMemoryError, RuntimeError) as error:
                    yield {**row, "reference": name, "skipped": str(error).splitlines()[0]}
                    continue
                yield {**row, "reference": name, "reference_ms": round(reference_ms, 4),
                       "ratio": round(reference_ms / ms, 3)}  # fmt: skip
            if not case.bytes and not case.references:
                yield row


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in found:
        note = row.get("wrong") or row.get("skipped")
        cells = [str(row.get(name, "")) for name in COLUMNS]
        if row["kernel"] == "copy":
            cells[2] = f"{row['GB_per_s']} GB/s"
        if note:
            cells[5] = f"{'WRONG' if 'wrong' in row else 'skipped'}: {note}"
        lines.append("| " + " | ".join(cells) + " |")
    first = found[0]
    about = ", ".join(
        f"{name} {first[name]}" for name in ("device", "torch", "triton", "cuda", "date") if name in first
    )
    return f"{about}; ratio = reference / ours\n\n" + "\n".join(lines)


def main() -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not importlib.import_module("torch").cuda.is_available():
        parser.error("there is no CUDA device; --tiny runs the same code without one")
    options.lengths = options.lengths or ([96] if options.tiny else [32768, 131072])
    options.output.mkdir(parents=True, exist_ok=True)
    found = []
    with (options.output / "benchmarks.jsonl").open("w") as file:
        for row in rows(options):
            found.append(row)
            print(json.dumps(row), file=file, flush=True)
            print({name: row[name] for name in (*COLUMNS, "skipped", "wrong") if name in row}, flush=True)
    text = table(found)
    (options.output / "benchmarks.md").write_text(text + "\n")
    print(f"\n{text}")
    return int(any("wrong" in row for row in found))


if __name__ == "__main__":
    raise SystemExit(main())
