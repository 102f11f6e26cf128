"""Peak memory of profiling one sample of the demo model, by length: it grows linearly.

Usage: python scripts/measure_memory.py [LENGTH ...]

Each length and setting runs in its own process; what is shown is the rise of the peak resident set over the
loaded model, so libraries and weights don't count.
"""

import re
import subprocess
import sys
from pathlib import Path

LENGTHS = (512, 1024, 2048, 4096)


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (the peak) of this process; Linux only."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(length: int, checkpointing: bool) -> None:
    from transformers.utils import logging

    from moa_search import load_model
    from moa_search.calibration import build_samples
    from moa_search.profiling import profile_samples

    logging.disable_progress_bar()
    model, tokenizer = load_model("demo", dtype="bfloat16")
    samples = build_samples(tokenizer, length=length, count=1, seed=0, split="calibration")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading doesn't count
    before = memory_mib("VmRSS")
    profile_samples(model, samples, checkpointing=checkpointing)
    print(memory_mib("VmHWM") - before)


def main() -> None:
    if "--measure" in sys.argv:
        measure(int(sys.argv[2]), sys.argv[3] == "True")
        return
    lengths = [int(text) for text in sys.argv[1:]] or LENGTHS
    print("| length | checkpointing MiB | per 1k tokens | without MiB | per 1k tokens |\n|---|---|---|---|---|")
    for length in lengths:
        cells = []
        for checkpointing in (True, False):
            command = [sys.executable, __file__, "--measure", str(length), str(checkpointing)]
            rise = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells += [f"{rise:.0f}", f"{rise / length * 1024:.0f}"]
        print(f"| {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
