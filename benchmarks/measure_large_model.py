"""Time and memory of profiling a Llama-3-8B-shaped model with random weights on one GPU, beside a plain backward.

Usage: python benchmarks/measure_large_model.py [--shape llama-8b] [--lengths 32768 131072] [--output FILE]

Needs torch, transformers, numpy, safetensors, pydantic. On a machine without pydantic and without network (from the
repository's root; the wheels of pydantic, pydantic-core, annotated-types and typing-inspection in ``.whl``):

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site:.:kernels python3 benchmarks/measure_large_model.py --output $OUT/large-model.jsonl

One JSON line per length: seconds and peak bytes of a profiled sample and of a plain forward and backward of the same
sample, both checkpointed, and their ratio; the samples are random tokens, which cost as much as any others.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from moa_search.data import Sample
from moa_search.profiling import profile_samples
from moa_search.profiling.checkpointing import checkpointed
from moa_search.profiling.measure import answer_loss

SHAPES = {
    "llama-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
ANSWER_TOKENS = 32


def plain(model, sample: Sample) -> None:
    with checkpointed(model, True):
        answer_loss(model, sample).backward()


def measured(work) -> tuple[float, int]:
    """Seconds and, on a GPU, peak bytes."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    work()
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if gpu else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=max(options.lengths))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    lines = []
    for length in options.lengths:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, length)
        sample = Sample(ids, ANSWER_TOKENS, "random", 0.5, "random")
        short = Sample(ids[:1024], ANSWER_TOKENS, "random", 0.5, "random")
        plain(model, short)
        profile_samples(model, [short])
        plain_s, plain_bytes = measured(lambda: plain(model, sample))  # noqa: B023
        ours_s, ours_bytes = measured(lambda: profile_samples(model, [sample]))  # noqa: B023
        lines.append(
            {
                "shape": options.shape,
                "length": length,
                "seconds": round(ours_s, 3),
                "plain_seconds": round(plain_s, 3),
                "ratio": round(ours_s / plain_s, 3),
                "peak_gib": round(ours_bytes / 2**30, 2),
                "plain_peak_gib": round(plain_bytes / 2**30, 2),
                "device": name,
                "dtype": "bfloat16",
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
        print(json.dumps(lines[-1]), flush=True)
    if options.output:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
