"""Fixtures for both packages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import numpy as np
import pytest

from moa_search.formats import ModelSignature, Plan, Profile
from moa_search.formats.profile_content import (
    MEAN_STATISTICS,
    SAMPLE_STATISTICS,
    LengthHeader,
    LengthProfile,
    ProfileHeader,
)
from moa_search.formats.provenance import Budget, LengthMetrics, Provenance
from moa_search.spans import DENSE, SpanRule
from tests.interpreter import ask_for_it

ask_for_it()

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-impls", action="store_true", help="run the runtime's matrix by every implementation, whole")
    parser.addoption("--all-seeds", action="store_true", help="run every random case of the kernels, not some of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only `--all-impls` and `--all-seeds` run."""
    extra = {"all_impls": "--all-impls", "seeds": "--all-seeds"}
    missing = [marker for marker, option in extra.items() if not config.getoption(option)]
    left_out = {item for item in items if any(item.get_closest_marker(marker) for marker in missing)}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, int]]]:
    """What progress bars show, by what they say is done: how much is, and the total, as they go on."""
    import io

    import tqdm.auto

    shown: dict[str, list[tuple[int, int]]] = {}

    class Shown(tqdm.auto.tqdm):  # type: ignore[type-arg]
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            drawn = super().update(n)
            shown.setdefault(self.desc, []).append((self.n, self.total))
            return drawn

        def close(self) -> None:
            if not self.disable:
                shown.setdefault(self.desc, []).append((self.n, self.total))
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Shown)
    return shown


@pytest.fixture
def tiny_signature() -> ModelSignature:
    """Three layers of four query heads, two to a KV head."""
    return ModelSignature(
        architecture="llama",
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope={"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        config={"hidden_size": 32, "vocab_size": 100},
    )


@pytest.fixture
def tiny_plan(tiny_signature: ModelSignature) -> Plan:
    """A plan with both kinds of pattern and every optional part."""
    rules = [[SpanRule(64 * layer, 48), DENSE if layer == 1 else SpanRule(-96, 200)] for layer in range(3)]
    return Plan.from_rules(
        rules,
        tiny_signature,
        sink=4,
        provenance=Provenance(
            searcher="exact",
            profile="sha256:" + "0" * 64,
            criterion="squared",
            budgets=(Budget(length=1024, density=0.5),),
            length_weights={"512": 1.0, "1024": 2.0},
            objective=0.125,
            dual_bound=0.124,
            gap=0.008,
            versions={"highspy": "1.16.0"},
        ),
        predicted=(LengthMetrics(length=1024, density=0.5, attention_density=0.75, loss=0.125),),
    )


@pytest.fixture
def tiny_profile(tiny_signature: ModelSignature) -> Profile:
    """Made-up statistics of two lengths, three layers and two KV heads.

    What a window loses (everything but ``recall``) is never negative, falls as the window grows and is zero
    once the window spans its rows; ``recall``, the attention mass kept, rises to one per row and query head.
    """
    rng = np.random.default_rng(0)
    grids = {512: (64, 128, 192, 256, 384, 512), 1024: (64, 128, 192, 256, 384, 512, 768, 1024)}
    lengths = tuple(
        LengthHeader(length=length, windows=windows, row_buckets=4, samples=3) for length, windows in grids.items()
    )
    header = ProfileHeader(
        model=tiny_signature,
        model_name="tiny",
        dtype="float32",
        sink=4,
        block=64,
        seed=0,
        calibration={"sources": ["made up"], "hash": "sha256:" + "1" * 64},
        lengths=lengths,
        versions={"numpy": np.__version__},
    )
    return Profile(header, {entry.length: _tiny_statistics(entry, tiny_signature, rng) for entry in lengths})


@pytest.fixture
def windowed_signature(tiny_signature: ModelSignature) -> ModelSignature:
    """The same model with a sliding window of its own in some layers."""
    return tiny_signature.model_copy(update={"config": {**tiny_signature.config, "sliding_window": 128}})


@pytest.fixture
def native_plan(windowed_signature: ModelSignature) -> Plan:
    """A plan whose middle layer keeps its own window of 128 tokens."""
    rules = [[SpanRule(300, 0), DENSE], [DENSE, DENSE], [SpanRule(0, 64), SpanRule(500, 0)]]
    return Plan.from_rules(rules, windowed_signature, native_layers=(1,), sink=4, block=64)


@pytest.fixture
def native_profile(tiny_profile: Profile, windowed_signature: ModelSignature) -> Profile:
    """The made-up profile with nothing measured in its middle layer, which has a window of its own."""
    header = tiny_profile.header.model_copy(update={"model": windowed_signature, "native_layers": (1,)})
    for entry in tiny_profile.by_length.values():
        for statistics in (entry.per_sample, entry.mean, entry.error):
            for values in statistics.values():
                values[..., 1, :, :, :] = 0
    return Profile(header, tiny_profile.by_length)


def _tiny_statistics(entry: LengthHeader, model: ModelSignature, rng: np.random.Generator) -> LengthProfile:
    rows = entry.length / entry.row_buckets
    last_row = rows * np.arange(1, entry.row_buckets + 1)
    out_of_reach = 1 - np.minimum(1, np.array(entry.windows) / last_row[:, None])  # [bucket, window]

    def missing(*shape: int) -> np.ndarray:
        heads = (*shape, model.num_hidden_layers, model.num_key_value_heads, 1, 1)
        values = rng.lognormal(size=heads) * out_of_reach ** rng.uniform(0.5, 3, size=heads)
        return np.asarray(values, dtype=np.float32)

    mean = {name: missing() for name in MEAN_STATISTICS}
    mean["recall"] = (rows * model.group * (1 - mean["recall"] / (1 + mean["recall"]))).astype(np.float32)
    return LengthProfile(
        header=entry,
        loss=rng.uniform(1, 2, size=entry.samples).astype(np.float32),
        per_sample={name: missing(entry.samples) for name in SAMPLE_STATISTICS},
        mean=mean,
        error={name: values * np.float32(0.1) for name, values in mean.items()},
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a byte-level tokenizer, as ``load_model`` takes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=2048,
        )
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(folder)
    return folder
