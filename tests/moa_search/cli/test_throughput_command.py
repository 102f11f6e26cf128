"""``moa-eval throughput``, run as a user runs it, on a tiny shape."""

import json
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from moa_search.cli import evaluate
from moa_search.modeling.loading import load_config

SHAPES = Path(__file__).parents[3] / "configs" / "shapes"


@pytest.fixture
def shape(tmp_path):
    """A configuration without weights."""
    path = tmp_path / "shape.json"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    path.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048, **sizes, **heads}))
    return path


@pytest.fixture
def call(run_main):
    """Run the command; returns exit status, output and errors."""
    return partial(run_main, evaluate.main, "moa-eval throughput")


def test_table_files_and_plot(call, shape, tmp_path):
    out = tmp_path / "out"
    status, text, err = call(
        "--random-weights", shape, "--layers", 2, "--density", 0.5, 0.25, "--ways", "dense", "plan", "--lengths", 600,
        "--batch", 1, 2, "--decode-tokens", 4, "--repetitions", 2, "--dtype", "float32", "--output", out,
    )  # fmt: skip
    assert status == 0, err
    assert "2 layers, dtype float32" in " ".join(text.split())
    assert "plan made up 0.5: logits off by" in text
    assert "Gain" not in text, "only with largest batches"
    runs, summary = pd.read_csv(out / "throughput.csv"), pd.read_csv(out / "summary.csv")
    assert (len(runs), len(summary)) == (12, 6)
    assert summary["decode_ratio"].notna().all()
    assert summary.set_index(["variant", "batch"])["density"].round(2)["made up 0.25", 2] == 0.26, "48 tokens at least"
    facts = json.loads((out / "facts.json").read_text())
    assert [gate["variant"] for gate in facts["gates"]] == ["made up 0.5", "made up 0.25"]
    assert (out / "throughput.png").read_bytes().startswith(b"\x89PNG")


def test_largest_batches_split_the_gain(call, shape, tmp_path, monkeypatch):
    from moa_search.evaluation.throughput import measuring

    monkeypatch.setattr(measuring, "_largest", lambda model, way, *rest: 3 if way.plan else 2)
    status, text, err = call(
        "--random-weights", shape, "--density", 0.5, "--ways", "dense", "plan", "--lengths", 300, "--batch", "largest",
        "--decode-tokens", 2, "--repetitions", 1, "--memory-limit-gib", 1, "--dtype", "float32", "--output", tmp_path,
    )  # fmt: skip
    assert status == 0, err
    assert "2 -> 3" in text
    gains = pd.read_csv(tmp_path / "gains.csv").iloc[0]
    assert gains["attention"] * gains["batch"] == pytest.approx(gains["gain"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --model or --random-weights"),
        (["demo", "--random-weights", "SHAPE"], "give --model or --random-weights"),
        (["demo", "--layers", 2], "layers: only with --random-weights"),
        (["--random-weights", "SHAPE"], "plan needs --plan or --density"),
        (["--random-weights", "SHAPE", "--density", 0.5, "--batch", "many"], "batch: 'many' is neither"),
        (["--random-weights", "SHAPE", "--density", 0.5, "--batch", 0], "batch: '0' is neither"),
        (
            ["--random-weights", "SHAPE", "--density", 0.5, "--batch", "largest", "--device", "cpu"],
            "needs --memory-limit-gib",
        ),
        (["--random-weights", "SHAPE", "--density", 2], "density: 2 is out of range"),
        (["--random-weights", "SHAPE", "--density", 0.5, "--lengths", 2048], "over the model's context"),
        (["--random-weights", "missing.json", "--density", 0.5], "missing.json"),
        (["--random-weights", "SHAPE", "--ways", "fast"], "'fast'"),
        (["--random-weights", "SHAPE", "--ways", "dense", "--repetitions", 0], "repetitions: 0 is out of range"),
    ],
)
def test_bad_input_is_one_line(call, shape, arguments, says):
    status, _, err = call(*[shape if argument == "SHAPE" else argument for argument in arguments])
    assert status == 2
    (line,) = [line for line in err.splitlines() if line.startswith("moa-eval throughput")]
    assert says in line


@pytest.mark.parametrize(("name", "kv_heads"), [("llama-2-7b", 32), ("llama-3-8b", 8)])
def test_shipped_shapes_are_what_they_are_called(name, kv_heads):
    config = load_config(str(SHAPES / f"{name}.json"))
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (32, 32, kv_heads)
    assert config.hidden_size // config.num_attention_heads == 128
