"""Scores as a user reads them."""

import pandas as pd
import pytest
from rich.console import Console

from moa_search.inspection.frames.scores import effective_lines, score_frames
from moa_search.inspection.printing import to_rich


def render(*parts):
    console = Console(width=160)
    with console.capture() as captured:
        console.print(*(part if isinstance(part, str) else to_rich(part) for part in parts))
    return captured.get()


def cells(text):
    return [
        [cell.strip() for cell in line.strip("│┃").split("│" if "│" in line else "┃")] for line in text.splitlines()
    ]


def rows(variants, lengths=(1024,), nll=1.5, way="forced"):
    """Three items each: the first variant gets all right, the others one less at every longer length."""
    return pd.DataFrame(
        {"task": task, "length": length, "variant": variant, "density": 0.25, "attention_density": 0.4,
         "metric": "exact match", "answers": way, "item": item, "nll": nll + place,
         "score": float(item >= step * (place > 0))}
        for task in ("passkey", "copy") for step, length in enumerate(lengths)
        for place, variant in enumerate(variants) for item in range(3)
    )  # fmt: skip


def test_means_with_intervals_and_less_dense():
    text = render(*score_frames(rows(["dense", "plan"])))
    assert "passkey at 1024 tokens, teacher-forced: mean of 3 items" in text
    assert "copy at 1024 tokens, teacher-forced: mean of 3 items" in text
    assert cells(text).count(["dense", "25.0%", "1.50 [1.50, 1.50]", "1.00 [1.00, 1.00]", "", ""]) == 2
    less = ["+1.00 [+1.00, +1.00]", "+0.00 [+0.00, +0.00]"]
    assert cells(text).count(["plan", "25.0%", "2.50 [2.50, 2.50]", "1.00 [1.00, 1.00]", *less]) == 2


def test_without_dense_nothing_is_less_dense():
    text = render(*score_frames(rows(["a", "b"])))
    assert "less dense" not in text
    assert cells(text).count(["b", "25.0%", "2.50 [2.50, 2.50]", "1.00 [1.00, 1.00]"]) == 2


def test_generated_answers_have_no_loss():
    text = render(*score_frames(rows(["dense", "plan"], nll=float("nan"), way="generated")))
    assert "1024 tokens, generated: mean of 3 items" in text
    assert cells(text).count(["dense", "25.0%", "", "1.00 [1.00, 1.00]", "", ""]) == 2
    assert "nan" not in text


@pytest.mark.parametrize("name", ["[bold]", "plan[/]", "a [red]b"])
def test_a_plans_name_is_no_markup(name):
    assert name in render(*score_frames(rows([name])))
    assert name in "\n".join(effective_lines(rows([name], lengths=(512, 1024))))


def test_effective_context_of_retrieval_tasks_over_several_lengths():
    lines = effective_lines(rows(["dense", "plan"], lengths=(512, 1024)))
    assert len(lines) == 3, "copies are no retrieval"
    assert "passkey" in lines[0]
    assert "dense: at least 1024 tokens (1024-1024), n = 3" in lines[1]
    assert "plan: 512 to 1024 tokens" in lines[2]
    assert effective_lines(rows(["dense"])) == []


def test_effective_context_over_texts_of_ones_own():
    items = rows(["dense"], lengths=(512, 1024)).replace(
        {"task": {"passkey": "passkey:law.txt", "copy": "copy:law.txt"}}
    )
    assert [line.partition(" (")[0] for line in effective_lines(items)] == [
        "effective context, passkey:law.txt",
        "  dense: at least 1024 tokens",
    ]
