from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from moa_search.errors import ConfigError, MoAError
from moa_search.formats import ModelSignature, Plan
from moa_search.formats.foreign import find_format, read_foreign, save_as

GOLDEN = Path(__file__).parents[2] / "golden"
MODEL = ModelSignature(
    architecture="llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)


def test_content_tells_formats_apart(tmp_path):
    assert find_format(GOLDEN / "moa-plan-1.json") == "plan"
    assert find_format(GOLDEN / "moa-alphas-betas.json") == "moa"
    assert find_format(GOLDEN / "duo-attention") == "duo"
    renamed = shutil.copy(GOLDEN / "duo-attention" / "full_attention_heads.tsv", tmp_path / "scores.json")
    assert find_format(renamed) == "duo"
    for text in ("", "{", "hello", "[1, 2]", "[" * 100_000, '{"schema": "moa-plan/1", "alphas": []}', "\0\1"):
        (tmp_path / "file").write_text(text)
        assert find_format(tmp_path / "file") == "plan", "whose reader says what is wrong"
    with pytest.raises(ConfigError, match=r"a folder with neither full_attention_heads\.tsv nor a front"):
        find_format(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        find_format(tmp_path / "none")


@pytest.mark.parametrize("format", ["plan", "moa", "duo"])
def test_every_format_there_and_back(tmp_path, format):
    source = GOLDEN / ("duo-attention" if format == "duo" else "moa-alphas-betas.json")
    plan = read_foreign(source, MODEL)
    save_as(plan, tmp_path / "out", format)
    assert find_format(tmp_path / "out") == format
    again = Plan.load(tmp_path / "out") if format == "plan" else read_foreign(tmp_path / "out", MODEL)
    assert again.patterns == plan.patterns
    assert (again.sink, again.min_span, again.anchor) == (plan.sink, plan.min_span, plan.anchor)


def test_sizes_of_duo_attention_come_from_beside_the_table_unless_given(tmp_path):
    folder = GOLDEN / "duo-attention"
    assert read_foreign(folder, MODEL).spans(1000)[0] == [1000, 320]
    assert read_foreign(folder / "full_attention_heads.tsv", MODEL, recent=100).spans(1000)[0] == [1000, 164]
    alone = shutil.copy(folder / "full_attention_heads.tsv", tmp_path)
    with pytest.raises(ConfigError, match=r"no config\.json beside it .* give sink and recent"):
        read_foreign(alone, MODEL, sink=4)
    assert read_foreign(alone, MODEL, sink=4, recent=60).spans(1000)[0] == [1000, 64]


@pytest.mark.parametrize("option", ["threshold", "sparsity", "sink", "recent"])
def test_options_of_the_other_format_are_refused(option):
    with pytest.raises(ConfigError, match=f"{option}: it is for DuoAttention's"):
        read_foreign(GOLDEN / "moa-alphas-betas.json", MODEL, **{option: 1})
    with pytest.raises(ConfigError, match="fold_lengths"):
        read_foreign(GOLDEN / "duo-attention", MODEL, fold_lengths=[100])


def test_nothing_is_written_where_a_format_cannot_express_a_plan(tmp_path, tiny_plan):
    for format in ("moa", "duo"):
        with pytest.raises(ConfigError, match="can't be written in"):
            save_as(tiny_plan, tmp_path / "out", format)
    assert not list(tmp_path.iterdir())


LAYER_FILES = {path.stem: path for path in (GOLDEN / "layers").iterdir()}


@pytest.mark.parametrize("name", LAYER_FILES)
def test_files_of_other_tools_stay_readable(name):
    assert find_format(LAYER_FILES[name]) == name
    plan = read_foreign(LAYER_FILES[name], MODEL)
    if name in ("modelopt", "kvtuner"):
        assert plan.tiers == [[(16, 16)] * 2, [(8, 8)] * 2]
        assert plan.density(1000) == 1
    else:
        assert plan.spans(1000) == [[320] * 2, [1000] * 2]
        assert plan.sink == (64 if name == "mlx" else 0)


@pytest.mark.parametrize(
    "name",
    [
        "moa-alphas-betas.json",
        "duo-attention/full_attention_heads.tsv",
        *(f"layers/{p.name}" for p in LAYER_FILES.values()),
    ],
)
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, name):
    original, rng = (GOLDEN / name).read_bytes(), random.Random(0)
    messages = []
    for _ in range(400):
        mutated = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(mutated))
            mutated[at : at + rng.randint(0, 2)] = rng.choice(
                [b"", b"-", b"9", b"e", b"[", b'"', b"\t", b"\n", b"\xff"]
            )
        (tmp_path / "file").write_bytes(mutated)
        try:
            plan = Plan.load(tmp_path / "file") if find_format(tmp_path / "file") == "plan" else None
            plan = plan or read_foreign(tmp_path / "file", MODEL, **({"sink": 4, "recent": 9} if "duo" in name else {}))
        except MoAError as error:
            messages.append(str(error))
        else:
            assert all(len(heads) == 2 for heads in plan.patterns)
    assert len(messages) > 200
    assert all(message.isprintable() for message in messages)
