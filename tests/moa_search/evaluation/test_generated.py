"""Generated answers, against teacher-forced ones on the demo model."""

from pathlib import Path

import numpy as np
import pytest

from moa_search import Plan, load_model
from moa_search.data import Sample
from moa_search.evaluation import compare_variants
from moa_search.evaluation.compare import Variant
from moa_search.evaluation.scoring import generate_answer, generate_tokens
from moa_search.tasks import TASKS

SHIPPED = Path(__file__).parents[3] / "profiles" / "smollm2-135m-instruct"


@pytest.mark.slow
def test_exact_matches_are_the_same_generated_and_teacher_forced():
    """Dense and under a plan whose rings wrap; some items are right and some wrong, so equality says something."""
    eighth = Plan.load(SHIPPED / "eighth.json")
    variants = [Variant("dense", lambda length: None), Variant("eighth", lambda length: eighth)]
    loaded = load_model("demo", dtype="float32")
    ways = {
        way: compare_variants(*loaded, variants, tasks=["passkey"], lengths=[400], count=3, seed=0, answers=way)
        for way in ("forced", "generated")
    }
    for way, rows in ways.items():
        assert set(rows["answers"]) == {way}
    keys = ["task", "variant", "item", "score"]
    assert ways["forced"][keys].equals(ways["generated"][keys])
    assert set(ways["forced"]["score"]) == {0.0, 1.0}
    assert ways["generated"]["nll"].isna().all()


def test_answers_are_compared_token_by_token(tiny_model):
    model, _ = tiny_model
    prompt = np.random.default_rng(0).integers(0, 256, 40)
    said = generate_tokens(model, prompt, 6)
    assert len(said) == 6
    wanted = said.copy()
    wanted[2] = (wanted[2] + 1) % 256
    answer = generate_answer(model, Sample(np.concatenate([prompt, wanted]), 6, "copy", 0.5, ""))
    assert answer.correct.tolist() == [True, True, False, True, True, True]
    assert np.isnan(answer.nll)


def test_perplexity_is_teacher_forced_whatever_is_asked_for(tiny_model):
    rows = compare_variants(
        *tiny_model, [Variant("dense", lambda length: None)], tasks=["perplexity", "passkey"], lengths=[400],
        count=2, seed=0, answers="generated",
    )  # fmt: skip
    assert dict(zip(rows["task"], rows["answers"], strict=True)) == {"perplexity": "forced", "passkey": "generated"}
    assert len(rows[rows["task"] == "perplexity"]) == 2 * TASKS["perplexity"].slices


def test_depths_multiply_the_items_of_tasks_that_have_them(tiny_model, bars):
    rows = compare_variants(
        *tiny_model, [Variant("dense", lambda length: None)], tasks=["passkey", "perplexity"], lengths=[400],
        count=2, seed=0, depths=[0.0, 1.0],
    )  # fmt: skip
    assert rows[rows["task"] == "passkey"]["depth"].tolist() == [0, 1, 0, 1]
    assert rows[rows["task"] == "perplexity"]["item"].nunique() == 2
    assert bars["Evaluating"][-1] == (2400, 2400)
