"""Runs that are killed at random moments and taken up again; prints one JSON line for each.

Started by test_resume.py in a process of its own: it forks, which is safe only before torch has used threads.
Usage: python killed_runs.py FOLDER KILLS
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from moa_search.data import Sample
from moa_search.profiling import profile_samples

SAMPLES = 12


def make_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def main():
    torch.set_num_threads(1)
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    model = make_model()
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(0, 64, 100 + i % 2), 4, "passkey", 0.5, "random") for i in range(SAMPLES)]
    began = time.perf_counter()
    whole = profile_samples(model, samples, partial=folder / "whole")
    length = time.perf_counter() - began
    print(json.dumps({"checksum": whole.checksum}), flush=True)
    random.seed(0)
    for number in range(kills):
        partial = folder / f"run-{number}"
        child = os.fork()
        if child == 0:
            profile_samples(model, samples, partial=partial)
            os._exit(0)
        # At a random moment of a random sample: on a busy machine, a moment of the whole run would mostly be its start.
        wanted = random.randrange(SAMPLES)
        while len(list(partial.glob("sample-*.safetensors"))) < wanted:
            time.sleep(1e-3)
        time.sleep(random.uniform(0, length / SAMPLES))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = len(list(partial.glob("sample-*.safetensors")))
        resumed = profile_samples(model, samples, partial=partial)
        print(json.dumps({"found": found, "resumed": resumed.run.resumed, "checksum": resumed.checksum}), flush=True)


if __name__ == "__main__":
    main()
