#!/usr/bin/env python3
"""Transformers' own generation tests, as they are and under a plan that keeps everything.

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers
    pip install parameterized httpx
    tools/try_transformers_tests.py transformers --models llama mistral gemma2

Every model that a test puts into eval mode gets an all-dense plan, so its attention, masks and caches are ours
and its output has to stay what it was. A checkout of a nearby version will do. Other arguments go to pytest.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType

MODELS = ["llama", "mistral", "qwen2", "gemma2", "gpt_neox"]
UNRELATED = {
    "fsdp": "FSDPTesterMixin",
    "tensor_parallel": "TensorParallelTesterMixin",
    "training": "TrainingTesterMixin",
}
"""Parts of the tests that need another version's internals, and that no generation test uses."""
PLAN, RESULTS = "MOA_TRY_PLAN", "MOA_TRY_RESULTS"
OUTCOMES = ("passed", "without the plan", "refused", "failed", "skipped")

ran = Counter()
"""Calls of the plan's attention in the test at hand."""


def main() -> None:
    """Run both ways and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of transformers")
    parser.add_argument("--models", nargs="+", default=MODELS, help="folders of its tests/models")
    options, for_pytest = parser.parse_known_args()
    files = [f"tests/models/{model}/test_modeling_{model}.py" for model in options.models]
    plain, planned = (run_tests(options.checkout, files, for_pytest, plan) for plan in (False, True))
    for model, file in zip(options.models, files, strict=True):
        for name, results in (("as it is", plain), ("under a plan", planned)):
            counts = Counter(result["outcome"] for result in results.values() if result["id"].startswith(file))
            print(f"{model:12} {name:14}", *(f"{counts[outcome]:3} {outcome:17}" for outcome in OUTCOMES))
    for test, result in planned.items():
        if result["outcome"] != plain[test]["outcome"]:
            print(f"{result['outcome']:17} {test}: {result['reason']}")


def run_tests(checkout: Path, files: list[str], arguments: list[str], plan: bool) -> dict[str, dict[str, str]]:
    """The outcome and its reason by test."""
    here = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.jsonl"
        results.touch()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "HF_HUB_OFFLINE": "1",
            PLAN: "dense" if plan else "",
            RESULTS: str(results),
        }
        # The checkout's own conftest.py and settings want pytest-xdist and more.
        own = ["--noconftest", "-c", os.devnull, "--rootdir", ".", "-W", "ignore", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-p", here.stem, "-q", *own, "-m", "generate", *files, *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {done.returncode}")
        lines = [json.loads(line) for line in results.read_text().splitlines()]
    return {result["id"]: result for result in lines}


def pytest_configure() -> None:
    """Stand in for the unrelated parts and, where asked to, put models under a plan."""
    if RESULTS not in os.environ:
        return
    for part, mixin in UNRELATED.items():
        module = ModuleType(f"tests.test_{part}_mixin")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[module.__name__] = module
    if os.environ[PLAN]:
        put_models_under_a_plan()


def put_models_under_a_plan() -> None:
    """Let `eval`, which transformers and its tests call on every new model, apply an all-dense plan."""
    import torch
    from transformers import AttentionInterface, PreTrainedModel

    from moa_search.formats import ModelSignature, Plan
    from moa_search.runtime import apply_plan
    from moa_search.runtime.attention import NAME, moa_attention
    from moa_search.spans import DENSE

    def counted(*args: object, **kwargs: object) -> object:
        if not torch.compiler.is_compiling():  # a counter in a compiled step would have it compiled again
            ran["calls"] += 1
        return moa_attention(*args, **kwargs)

    def eval_under_plan(model: PreTrainedModel) -> PreTrainedModel:
        super(PreTrainedModel, model).eval()
        if model.can_generate() and not model.config.is_encoder_decoder:
            apply_plan(model, Plan.uniform(DENSE, ModelSignature.of(model.config)))
            AttentionInterface.register(NAME, counted)
        return model

    PreTrainedModel.eval = eval_under_plan


def pytest_collection_modifyitems(items: list) -> None:
    """Ask for no attention weights, which a plan refuses, and let tests that look into a cache look into ours."""
    if RESULTS not in os.environ or not items:
        return
    from tests.generation import test_utils
    from tests.generation.test_utils import GenerationTesterMixin

    if os.environ[PLAN]:
        for name, fixed in (("DynamicCache", False), ("StaticCache", True)):
            setattr(test_utils, name, or_ours(getattr(test_utils, name), fixed))
    GenerationTesterMixin.has_attentions = False
    for item in items:
        item.cls.has_attentions = False
    for name in ("_check_caches_are_equal", "_check_past_key_values_for_generate"):
        setattr(GenerationTesterMixin, name, on_whole_caches(getattr(GenerationTesterMixin, name)))


def or_ours(stock: type, fixed: bool) -> type:
    """A class of caches of transformers, ours of growing or ``fixed`` size among its instances."""
    from moa_search import MoACache

    class Kind(type):
        def __instancecheck__(cls, cache: object) -> bool:
            ours = isinstance(cache, MoACache) and cache.is_compileable == fixed
            return ours or isinstance(cache, stock)

        def __call__(cls, *args: object, **kwargs: object) -> object:
            return stock(*args, **kwargs)

    return Kind(stock.__name__, (), {})


def on_whole_caches(check: object) -> object:
    """A check of the tests that is handed `whole` caches."""
    from transformers import Cache

    def checked(*args: object, **kwargs: object) -> object:
        args, kwargs = [*args], {**kwargs}
        for values, keys in ((args, range(len(args))), (kwargs, list(kwargs))):
            for key in keys:
                if isinstance(values[key], Cache):
                    values[key] = whole(values[key])
        return check(*args, **kwargs)

    return checked


def whole(cache: object) -> object:
    """A cache whose keys and values are ``[batch, kv_heads, tokens, width]``, zero where none is kept."""
    import torch

    from moa_search.runtime.cache import MoACacheLayer

    if not any(isinstance(layer, MoACacheLayer) for layer in cache.layers):
        return cache
    result = copy.copy(cache)
    result.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in result.layers:
        if not isinstance(layer, MoACacheLayer):
            continue
        batch = len(layer.keys)
        tokens = layer.get_max_length() if layer.is_compileable else layer.cumulative_length
        position = layer.positions().expand(batch, -1)
        for name in ("keys", "values"):
            heads = []
            for slots in layer.slots(only_sink=False):
                at, states = position[:, slots], getattr(layer, name)[:, slots]
                sample, slot = (at < tokens).nonzero(as_tuple=True)
                head = states.new_zeros(batch, tokens, states.shape[2])
                head[sample, at[sample, slot]] = states[sample, slot]
                heads.append(head)
            setattr(layer, name, torch.stack(heads, 1))
    return result


def pytest_runtest_makereport(item: object, call: object) -> None:
    """Write down how each test ended."""
    if call.when == "setup":
        ran.clear()
    error = None if call.excinfo is None else call.excinfo.value
    if RESULTS not in os.environ or (call.when != "call" and error is None) or call.when == "teardown":
        return
    if error is None:
        outcome = "passed" if ran or not os.environ[PLAN] else "without the plan"
    else:
        outcome = "skipped" if "Skip" in type(error).__name__ else "refused" if is_ours(error) else "failed"
    reason = "" if error is None else f"{type(error).__name__}: {error}".partition("\n")[0][:160]
    with open(os.environ[RESULTS], "a") as results:
        results.write(json.dumps({"id": item.nodeid, "outcome": outcome, "reason": reason}) + "\n")


def is_ours(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is a refusal of ours."""
    from moa_search.errors import MoAError

    return error is not None and (isinstance(error, MoAError) or is_ours(error.__cause__ or error.__context__))


if __name__ == "__main__":
    main()
