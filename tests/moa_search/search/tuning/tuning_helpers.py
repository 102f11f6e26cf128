"""A made-up problem for the outer loop: few heads, a plan per setting of the knobs, a loss that takes no time.

As a program, it is one worker of a study: python tuning_helpers.py FOLDER STORAGE TRIALS SECONDS INDEX.
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from moa_search.errors import BudgetInfeasibleError, ConfigError
from moa_search.formats import ModelSignature, Plan
from moa_search.search.tuning.config import Tuning
from moa_search.search.tuning.knobs import Knobs, KnobSpace, weigh
from moa_search.search.tuning.trials import work
from moa_search.spans import SpanRule

LAYERS, HEADS = 4, 2
WINDOWS = np.array([64, 128, 256, 512, 1024])
SPACE = KnobSpace((1024, 2048), ("signed", "squared"))
BEST_DEPTH = (0.6, -0.3, 0.2, -0.9)


def losses() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    heads = rng.lognormal(size=(LAYERS * HEADS, 1))
    steepness = rng.uniform(0.5, 3, (2, LAYERS * HEADS, 1))
    return [heads * (1 - np.log(WINDOWS / 64) / np.log(32)) ** power for power in steepness]


def model() -> ModelSignature:
    return ModelSignature(
        architecture="llama",
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=8,
        rope={"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        config={"hidden_size": 16, "vocab_size": 100},
    )


def decode(knobs: Knobs) -> Plan:
    """Windows by greedy gain: each step widens the head that gains most."""
    table = weigh(losses(), HEADS, knobs)
    choice = np.zeros(len(table), dtype=int)
    for _ in range(int((knobs.density or 0.5) * len(table) * (len(WINDOWS) - 1))):
        wider = np.minimum(choice + 1, len(WINDOWS) - 1)
        heads = np.arange(len(table))
        choice[np.argmax(table[heads, choice] - table[heads, wider])] += 1
    rules = [[SpanRule(int(WINDOWS[c]), 0) for c in layer] for layer in choice.reshape(LAYERS, HEADS)]
    return Plan.from_rules(rules, model())


def picky_decode(knobs: Knobs) -> Plan:
    """`decode`, where no plan is robust enough for a third of the settings."""
    if knobs.robust > 1.3:
        raise BudgetInfeasibleError("made up: nothing is that robust")
    return decode(knobs)


def true_loss(plan: Plan, seconds: float = 0.0) -> float:
    """Loss in which layers matter otherwise than the profile says."""
    time.sleep(seconds)
    spans = np.array(plan.spans(1024)).ravel()
    table = losses()[0] * np.repeat(np.exp(BEST_DEPTH), HEADS)[:, None]
    return float(table[np.arange(len(table)), np.searchsorted(WINDOWS, spans)].sum())


def mean_span(plan: Plan) -> float:
    return float(np.mean(plan.spans(1024)))


def tuning(folder: Path, trials: int, **fields) -> Tuning:
    return Tuning(SPACE, folder, trials, settings={"profile": "sha256:0", "data": "sha256:1"}, **fields)


def worker(index: int, device: str | None, shared: Tuning, seconds: float) -> None:
    """Target of worker processes."""
    shared.folder.mkdir(parents=True, exist_ok=True)
    (shared.folder / f"worker-{index}").touch()
    work(shared, decode, partial(true_loss, seconds=seconds), worker=index)


def worker_that_is_killed(index: int, device: str | None, shared: Tuning) -> None:
    """Target of worker processes: the second one is killed in its first trial."""

    def evaluate(plan: Plan) -> float:
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return true_loss(plan, seconds=0.5)

    work(shared, decode, evaluate, worker=index)


def worker_that_fails(index: int, device: str | None, shared: Tuning, trials: int) -> None:
    """Target of worker processes: an error after ``trials`` of its own."""
    left = iter(range(trials))

    def evaluate(plan: Plan) -> float:
        if next(left, None) is None:
            raise ConfigError("made up")
        return true_loss(plan)

    work(shared, decode, evaluate, worker=index)


def end_somehow(index: int, device: str | None, folder: Path) -> None:
    (folder / f"{index}").write_text(str(device))
    if index == 1:
        raise ConfigError("made up")
    if index == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_interrupted(index: int, device: str | None, folder: Path) -> None:
    (folder / f"waiting-{index}").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / f"interrupted-{index}").touch()
        raise


if __name__ == "__main__":
    folder, storage, trials, seconds, index = sys.argv[1:]
    worker(int(index), None, tuning(Path(folder), int(trials), storage=storage, heartbeat_seconds=1), float(seconds))
