"""Calibration as a user asks for it: sources, answers, workers, cache."""

import json
import re
import threading

import pytest
import torch

from moa_search.calibration import calibrate
from moa_search.data import hash_samples, save_samples
from moa_search.errors import CalibrationError, ConfigError, ModelMismatchError
from moa_search.parallel import Workers
from moa_search.tasks import build_samples
from moa_search.tasks.collecting import ROUNDS

CODE = re.compile(r"What is the code of box (\d+)\?")


@pytest.fixture
def file(tmp_path, records):
    path = tmp_path / "boxes.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in records))
    return str(path)


def code(prompt):
    """What a good model says about a record."""
    return f"It is K{int(CODE.findall(prompt)[-1]):03}.<end>"


def run(model, tokenizer, **changes):
    options = {"sources": ["passkey"], "lengths": [900], "samples": 3, "seed": 0, "split": "test", **changes}
    return calibrate(model, tokenizer, **options)


def texts(calibration, tokenizer):
    return [tokenizer.decode(sample.ids) for sample in calibration.samples]


def test_the_built_in_samples_are_those_of_build_samples(plain_tokenizer):
    made = calibrate(
        None, plain_tokenizer, sources=["passkey", "copy"], lengths=[600, 800], samples=5, seed=2,
        answers="dataset", chat="never",
    )  # fmt: skip
    expected = [
        sample
        for length in (600, 800)
        for sample in build_samples(plain_tokenizer, length=length, count=5, seed=2, split="calibration")
    ]
    assert hash_samples(made.samples) == hash_samples(expected)
    assert [sample.source for sample in made.samples] == [sample.task for sample in made.samples]
    assert made.dropped == {"passkey": {"tried": 6, "kept": 6}, "copy": {"tried": 4, "kept": 4}}
    assert json.loads(json.dumps(made.settings)) == made.settings


def test_answers_of_the_data_have_exactly_the_length(chat_tokenizer, file):
    sources = ["passkey", "question", file, "multikey", "copy"]
    made = run(None, chat_tokenizer, sources=sources, samples=10, lengths=[1000, 1100], answers="dataset")
    assert [sample.source for sample in made.samples] == sources * 4
    assert [sample.length for sample in made.samples] == [1000] * 10 + [1100] * 10


def test_the_models_own_words_are_supervised(chat_tokenizer, scripted, file):
    made = run(scripted(chat_tokenizer, code), chat_tokenizer, sources=[file], samples=4)
    for sample in made.samples:
        prompt, answer = chat_tokenizer.decode(sample.prompt), chat_tokenizer.decode(sample.answer)
        assert answer == code(prompt)
        assert len(sample.prompt) == 900 - 64
        assert sample.target_length == 900 > sample.length
        assert "It is K" not in prompt
    assert made.dropped == {file: {"tried": 4, "kept": 4}}


def test_wrong_answers_are_dropped_counted_and_replaced(chat_tokenizer, scripted, file):
    def every_second(prompt):
        return code(prompt) if int(CODE.findall(prompt)[-1]) % 2 else "I don't know.<end>"

    made = run(scripted(chat_tokenizer, every_second), chat_tokenizer, sources=[file], samples=4)
    numbers = [int(CODE.findall(text)[-1]) for text in texts(made, chat_tokenizer)]
    assert len(set(numbers)) == 4
    assert all(number % 2 for number in numbers)
    assert made.dropped[file]["kept"] == 4 < made.dropped[file]["tried"]
    assert made.settings["answered"] == made.dropped


def test_what_is_drawn_does_not_depend_on_the_model(chat_tokenizer, scripted):
    def right(prompt):
        return " " + re.findall(r"Remember it\. (\d+)", prompt)[0]

    good = scripted(chat_tokenizer, right)
    picky = scripted(chat_tokenizer, lambda prompt: right(prompt) if "1" in right(prompt) else " 00000")
    run(good, chat_tokenizer, samples=6, cache=False)
    run(picky, chat_tokenizer, samples=6, cache=False)
    assert picky.asked[:6] == good.asked
    assert len(picky.asked) > 6


def test_a_source_that_is_never_answered_rightly_is_given_up(chat_tokenizer, scripted):
    model = scripted(chat_tokenizer, lambda prompt: " 00000")
    with pytest.raises(
        CalibrationError, match=r"source 'passkey': the dense model answered 0 of 24 items of 900 tokens"
    ):
        run(model, chat_tokenizer)
    assert len(model.asked) == 3 * ROUNDS == 24


@pytest.mark.parametrize("answers", ["model", "dataset"])
def test_too_few_records(chat_tokenizer, scripted, file, answers):
    with pytest.raises(CalibrationError, match=r"has only \d+ records for 900 tokens, 39 are needed"):
        run(scripted(chat_tokenizer, code), chat_tokenizer, sources=[file], samples=39, answers=answers)


def test_without_a_reference_every_answer_is_kept(chat_tokenizer, scripted, tmp_path, records):
    rows = [{"context": row["context"], "question": row["question"]} for row in records]
    (tmp_path / "open.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = scripted(chat_tokenizer, lambda prompt: "Whatever.<end>")
    made = run(model, chat_tokenizer, sources=[f"{tmp_path}/open.jsonl"])
    assert {chat_tokenizer.decode(sample.answer) for sample in made.samples} == {"Whatever.<end>"}


class Shared:
    """Processes as threads that meet to exchange what they pass."""

    def __init__(self, count):
        self.count, self.barrier, self.slots = count, threading.Barrier(count, timeout=60), [None] * count

    def workers(self, rank):
        shared = self

        class Thread(Workers):
            def everywhere(self, mine):
                shared.slots[rank] = mine
                shared.barrier.wait()
                parts = list(shared.slots)
                shared.barrier.wait()
                return parts

        return Thread(rank, self.count)


@pytest.mark.parametrize("count", [2, 5])
def test_any_number_of_workers_gives_the_same(chat_tokenizer, scripted, file, count):
    def most(prompt):
        return code(prompt) if int(CODE.findall(prompt)[-1]) % 3 else "No idea.<end>"

    def job(workers, results):
        model = scripted(chat_tokenizer, most)
        results[workers.rank] = (
            model,
            run(model, chat_tokenizer, sources=[file], samples=4, workers=workers, cache=False),
        )

    alone, results = {}, {}
    job(Workers(), alone)
    shared = Shared(count)
    threads = [threading.Thread(target=job, args=(shared.workers(rank), results)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, made in results.values():
        assert hash_samples(made.samples) == hash_samples(alone[0][1].samples)
        assert made.settings == alone[0][1].settings
    assert all(len(model.asked) < len(alone[0][0].asked) for model, _ in results.values())


class TestCache:
    def test_the_second_time_the_model_is_not_asked(self, chat_tokenizer, scripted, file):
        first, second = (scripted(chat_tokenizer, code) for _ in range(2))
        one = run(first, chat_tokenizer, sources=[file])
        two = run(second, chat_tokenizer, sources=[file])
        assert first.asked
        assert not second.asked
        assert hash_samples(one.samples) == hash_samples(two.samples)
        assert [vars(s)["target_length"] for s in two.samples] == [900] * 3
        assert one.dropped == two.dropped
        assert one.settings == two.settings

    @pytest.mark.parametrize("change", [{"seed": 1}, {"max_answer_tokens": 50}, {"chat": "never"}, {"cache": False}])
    def test_other_settings_ask_again(self, chat_tokenizer, scripted, file, change):
        run(scripted(chat_tokenizer, code), chat_tokenizer, sources=[file])
        model = scripted(chat_tokenizer, code)
        run(model, chat_tokenizer, sources=[file], **change)
        assert model.asked

    def test_other_weights_or_data_ask_again(self, chat_tokenizer, scripted, file):
        run(scripted(chat_tokenizer, code), chat_tokenizer, sources=[file])
        other = scripted(chat_tokenizer, code)
        torch.nn.init.zeros_(other.weight)
        run(other, chat_tokenizer, sources=[file])
        assert other.asked
        with open(file) as lines:
            kept = lines.read().replace("Report", "Account")
        with open(file, "w") as lines:
            lines.write(kept)
        model = scripted(chat_tokenizer, code)
        run(model, chat_tokenizer, sources=[file])
        assert model.asked

    def test_a_damaged_entry_is_made_anew(self, chat_tokenizer, scripted, file, tmp_path):
        run(scripted(chat_tokenizer, code), chat_tokenizer, sources=[file])
        (entry,) = (tmp_path / "cache" / "calibration").iterdir()
        next(entry.glob("*.json")).unlink()
        again, third = (scripted(chat_tokenizer, code) for _ in range(2))
        run(again, chat_tokenizer, sources=[file])
        assert again.asked
        run(third, chat_tokenizer, sources=[file])
        assert not third.asked

    def test_a_cache_that_cannot_be_written_is_told_before_the_work(
        self, chat_tokenizer, scripted, tmp_path, monkeypatch
    ):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MOA_SEARCH_CACHE", str(tmp_path / "file"))
        model = scripted(chat_tokenizer, code)
        with pytest.raises(ConfigError, match=r"cache folder .* can't be made .* set MOA_SEARCH_CACHE"):
            run(model, chat_tokenizer)
        assert not model.asked


class TestSaved:
    @pytest.fixture
    def folder(self, plain_tokenizer, tmp_path):
        made = build_samples(plain_tokenizer, length=900, count=3, seed=5, split="test", tasks=["copy"])
        save_samples(made, tmp_path / "saved", plain_tokenizer, split="test")
        return f"samples:{tmp_path}/saved"

    def test_they_take_turns_with_others_as_they_are(self, folder, plain_tokenizer):
        made = run(None, plain_tokenizer, sources=["passkey", folder], samples=6, answers="dataset")
        assert [sample.task for sample in made.samples] == ["passkey", "copy"] * 3
        expected = build_samples(plain_tokenizer, length=900, count=3, seed=5, split="test", tasks=["copy"])
        assert hash_samples(made.samples[1::2]) == hash_samples(expected)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"split": "calibration"}, "holds samples of the test split, not of calibration"),
            ({"lengths": [800]}, "has 0 samples of 800 tokens, 3 are needed"),
            ({"samples": 4}, "has 3 samples of 900 tokens, 4 are needed"),
        ],
    )
    def test_refusals(self, folder, plain_tokenizer, changes, message):
        with pytest.raises(CalibrationError, match=message):
            run(None, plain_tokenizer, sources=[folder], **changes)

    def test_another_tokenizer(self, folder, chat_tokenizer):
        with pytest.raises(ModelMismatchError, match="another tokenizer"):
            run(None, chat_tokenizer, sources=[folder])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "sources: there is none"),
        ({"sources": ["copy", "copy"]}, "sources: copy, copy names one twice"),
        ({"sources": ["pass:x"]}, "task 'pass' is unknown"),
        ({"lengths": []}, "lengths: 0 is out of range"),
        ({"lengths": [900, 900]}, "lengths: 900, 900 names one twice"),
        ({"samples": 0}, "samples: 0 is out of range"),
        ({"max_answer_tokens": 0}, "max_answer_tokens: 0 is out of range"),
        ({"seed": -1}, "seed is -1"),
        ({"answers": "human"}, "answers: 'human' is unknown; choose from model, dataset"),
        ({"chat": "always"}, "chat: 'always' is unknown; choose from auto, never"),
        ({"split": "train"}, "split: 'train' is unknown"),
    ],
)
def test_options_that_cannot_be_used(plain_tokenizer, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(None, plain_tokenizer, **changes)


def test_progress_in_tokens(plain_tokenizer, bars):
    run(None, plain_tokenizer, lengths=[700, 900], samples=2, answers="dataset")
    assert bars["Calibrating"][:4] == [(700, 3200), (1400, 3200), (2300, 3200), (3200, 3200)]
