"""What users of other tools reported in public, done with ours: each test names the report and what its user did."""

from __future__ import annotations

import contextlib
import copy
import json
import threading

import pytest
import torch
from transformers import AutoTokenizer

from moa_search import ModelSignature, Plan, apply_plan
from moa_search.data import SPLITS
from moa_search.data.frames import chat_pieces
from moa_search.data.loading import load_records
from moa_search.errors import CalibrationError, ConfigError, UnsupportedInputError
from moa_search.runtime import MoACache
from moa_search.search.tuning.loop import tune
from moa_search.search.tuning.studies import keep_settings, open_study
from moa_search.spans import DENSE
from moa_search.tasks import parse_source
from tests.moa_search.runtime.explicit import explicit, greedy, logits, tiny_model, tiny_plan, tokens
from tests.moa_search.search.tuning.tuning_helpers import decode, true_loss, tuning


@pytest.fixture(scope="module")
def plan():
    return tiny_plan(tiny_model())


@pytest.fixture(scope="module")
def model(plan):
    return apply_plan(tiny_model(), plan)


@pytest.fixture(scope="module")
def reference(plan):
    return explicit(tiny_model(), plan)


def padded(sides, left=True):
    longest = max(side.shape[1] for side in sides)
    rows = []
    for side in sides:
        padding = side.new_zeros(1, longest - side.shape[1])
        rows.append(torch.cat([padding, side] if left else [side, padding], 1))
    batch = torch.cat(rows)
    return batch, (batch != 0).long()


class TestPadding:
    def test_right_padded_batch(self, model, reference):
        """huggingface/transformers#30378: a batch padded on the right, compared with each prompt alone."""
        alone = [tokens(1, 200, 1), tokens(1, 140, 2)]
        batch, mask = padded(alone, left=False)
        with torch.no_grad():
            got = model(batch, attention_mask=mask).logits
        for row, prompt in zip(got, alone, strict=True):
            torch.testing.assert_close(row[: prompt.shape[1]], logits(reference, prompt)[0])

    def test_second_turn_padded_in_the_middle(self, model, reference):
        """huggingface/transformers#18104: both turns of a batch padded on the left, the cache kept between them."""
        first, second = [tokens(1, 90, 1), tokens(1, 150, 2)], [tokens(1, 40, 3), tokens(1, 10, 4)]
        (one, one_mask), (two, two_mask) = padded(first), padded(second)
        said = model.generate(
            one, attention_mask=one_mask, max_new_tokens=6, do_sample=False, return_dict_in_generate=True
        )
        new = said.sequences[:, -6:]
        got = model.generate(
            torch.cat([said.sequences, two], 1),
            attention_mask=torch.cat([one_mask, torch.ones_like(new), two_mask], 1),
            past_key_values=said.past_key_values,
            max_new_tokens=8,
            do_sample=False,
        )
        for row in (0, 1):
            whole = torch.cat([first[row], new[row : row + 1], second[row]], 1)
            assert got[row, -8:].tolist() == greedy(reference, whole, 8)[0, -8:].tolist()


class TestContinuing:
    @pytest.fixture
    def kept(self, model):
        cache = MoACache(model.config, tiny_plan(model))
        with torch.no_grad():
            model(tokens(1, 150, 1), past_key_values=cache)
        return cache

    @pytest.mark.parametrize("max_length", [None, 200])
    @pytest.mark.parametrize("given", [1, 30, 150])
    def test_nothing_new_after_what_the_cache_holds(self, model, max_length, given):
        """huggingface/transformers#32019, #38727: only the new tokens given, or the same prompt with a used cache."""
        cache = MoACache(model.config, tiny_plan(model), max_length=max_length)
        with torch.no_grad():
            model(tokens(1, 150, 1), past_key_values=cache)
        with pytest.raises(UnsupportedInputError, match=f"{given} tokens are given and the cache holds 150: pass"):
            model.generate(tokens(1, given, 2), past_key_values=cache, max_new_tokens=5, do_sample=False)

    @pytest.mark.parametrize("length", [100, 150])
    def test_a_mask_of_the_past_alone(self, model, kept, length):
        """huggingface/transformers#47597: the mask of the first turn is passed again beside one new token."""
        with pytest.raises(UnsupportedInputError, match="1 tokens are given and the cache holds 150"):
            model.generate(
                tokens(1, 1, 2), attention_mask=torch.ones(1, length), past_key_values=kept, max_new_tokens=5
            )

    def test_only_new_tokens_with_the_whole_mask(self, model, reference, kept):
        """huggingface/transformers#32019: the right way to pass new tokens only goes on as it did."""
        new = tokens(1, 30, 2)
        got = model.generate(
            new, attention_mask=torch.ones(1, 180), past_key_values=kept, max_new_tokens=5, do_sample=False
        )
        whole = torch.cat([tokens(1, 150, 1), new], 1)
        assert got[0, -5:].tolist() == greedy(reference, whole, 5)[0, -5:].tolist()

    def test_embeddings_with_a_kept_cache(self, model, reference, kept):
        """huggingface/transformers#35707: a session that goes on by inputs_embeds and past_key_values."""
        whole = torch.cat([tokens(1, 150, 1), tokens(1, 30, 2)], 1)
        embeddings = model.get_input_embeddings()(whole)
        got = model.generate(inputs_embeds=embeddings, past_key_values=kept, max_new_tokens=8, do_sample=False)
        assert got.tolist() == greedy(reference, whole, 8)[:, -8:].tolist()
        with pytest.raises(UnsupportedInputError, match="30 tokens are given and the cache holds"):
            model.generate(inputs_embeds=embeddings[:, -30:], past_key_values=kept, max_new_tokens=8)

    def test_positions_that_leave_a_gap(self, plan):
        """NVIDIA/kvpress#16, huggingface/transformers#39814: positions that don't start at 0, or jump."""
        plain = tiny_model()
        signature = ModelSignature.of(plain.config)
        heads = [[DENSE] * signature.num_key_value_heads] * signature.num_hidden_layers
        under = apply_plan(copy.deepcopy(plain), Plan.from_rules(heads, signature, sink=4, block=8))
        ids, after = tokens(1, 120, 1), torch.arange(180, 220)[None]
        with torch.no_grad():
            got, want = [], []
            for results, one in ((got, under), (want, plain)):
                results.append(one(ids, position_ids=torch.arange(100, 220)[None]).logits)
                past = one(ids[:, :80], use_cache=True).past_key_values
                results.append(one(ids[:, 80:], position_ids=after, past_key_values=past).logits)
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*checkpoint:UserWarning", "ignore:.*gradient_checkpointing:FutureWarning")
class TestTraining:
    @pytest.fixture
    def trained(self, plan):
        model = apply_plan(tiny_model(), plan)
        model.gradient_checkpointing_enable()
        return model.train()

    def test_generating_under_gradient_checkpointing(self, trained, reference):
        """huggingface/transformers#36051: generate in the midst of training, where layers drop the cache."""
        prompt = tokens(1, 120, 1)
        with pytest.raises(UnsupportedInputError, match=r"call model.eval\(\) to generate, or pass use_cache=False"):
            trained.generate(prompt, max_new_tokens=8, do_sample=False)
        right = greedy(reference, prompt, 8).tolist()
        assert trained.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False).tolist() == right
        assert trained.eval().generate(prompt, max_new_tokens=8, do_sample=False).tolist() == right

    def test_a_training_step_under_gradient_checkpointing(self, trained, plan):
        """huggingface/transformers#21737: loss and gradients where layers are run again."""
        ids = tokens(2, 120, 1)
        reference = explicit(tiny_model(), plan).train()
        losses = [one(ids, labels=ids, use_cache=False).loss for one in (trained, reference)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        for mine, theirs in zip(trained.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_threads_share_a_model(model, reference):
    """huggingface/transformers#25197: several threads generate with one model at the same time."""
    prompts = [tokens(1, 100 + 20 * seed, seed) for seed in range(4)]
    got = {}

    def write(number):
        got[number] = model.generate(prompts[number], max_new_tokens=12, do_sample=False).tolist()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {number: greedy(reference, prompt, 12).tolist() for number, prompt in enumerate(prompts)}


class TestInterruptions:
    @pytest.mark.parametrize("max_length", [None, 400])
    @pytest.mark.parametrize("past", [0, 100])
    @pytest.mark.parametrize("layer", [1, 2])
    def test_a_pass_that_ended_between_two_layers(self, plan, reference, max_length, past, layer):
        """huggingface/text-generation-inference#143: a pass fails midway, and its cache is used again."""
        model = apply_plan(tiny_model(), plan)
        prompt, cache = tokens(1, 150, 1), MoACache(model.config, plan, max_length=max_length)
        with torch.no_grad():
            if past:
                model(prompt[:, :past], past_key_values=cache)

            def fail(*anything):
                raise torch.OutOfMemoryError

            hook = model.model.layers[layer].register_forward_pre_hook(fail)
            with pytest.raises(torch.OutOfMemoryError):
                model(prompt[:, past : past + 20], past_key_values=cache)
            hook.remove()
            for start in (past, past + 20):
                with pytest.raises(UnsupportedInputError, match=r"failed or was interrupted midway; reset\(\)"):
                    model(prompt[:, start:], past_key_values=cache)
            cache.reset()
            torch.testing.assert_close(model(prompt, past_key_values=cache).logits, logits(reference, prompt))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(plan, reference, tmp_path, where, when):
    """huggingface/accelerate#1711: weights lie on the meta device but while their layer runs."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    if when == "after":
        apply_plan(model, plan)
    device = {"execution_device": torch.device("cpu")}
    if where == "cpu":
        accelerate.cpu_offload(model, **device)
    else:
        accelerate.disk_offload(model, str(tmp_path), **device)
    if when == "before":
        apply_plan(model, plan)
    prompt = tokens(1, 150, 1)
    assert model.generate(prompt, max_new_tokens=6, do_sample=False).tolist() == greedy(reference, prompt, 6).tolist()


class TestData:
    def records(self, path, content):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        sides = []
        for split in SPLITS:
            with contextlib.suppress(CalibrationError):  # none for this side
                sides += load_records(parse_source(f"records:{path}"), split, answers=True)
        return sides

    def lines(self, make, count=40):
        return "\n".join(
            json.dumps({"context": f"c{n}", "question": f"q{n}", "answer": f"a{n}"} | make(n)) for n in range(count)
        )

    def test_nothing_for_megabytes_then_a_text(self, tmp_path):
        """huggingface/datasets#7222: a column is null in the first ten megabytes and a text later."""
        long = "x" * 300_000
        found = self.records(
            tmp_path / "a.jsonl",
            self.lines(lambda n: {"context": f"c{n}" + long * (n < 40), "answer": f"a{n}" if n >= 60 else None}, 80),
        )
        assert sorted(record.answers for record in found) == [(f"a{n}",) for n in range(60, 80)]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
    def test_byte_order_mark(self, tmp_path, name):
        """huggingface/datasets#8241: a file that an editor on Windows has marked as UTF-8."""
        lines = self.lines(lambda n: {})
        content = lines if name == "a.jsonl" else f"[{lines.replace(chr(10), ',')}]"
        found = self.records(tmp_path / name, b"\xef\xbb\xbf" + content.encode())
        assert {record.context for record in found} == {f"c{n}" for n in range(40)}

    def test_numbers_and_texts_in_one_column(self, tmp_path):
        """huggingface/datasets#6106, #6460: texts and numbers, or lists and objects, take turns in a column."""
        found = self.records(
            tmp_path / "a.jsonl",
            self.lines(lambda n: {"answer": "-0.2253" if n % 2 else -0.2253, "ner": [[0, "x"]] if n % 2 else {"a": 1}}),
        )
        assert [record.answers for record in found] == [("-0.2253",)] * 40

    def test_a_text_that_reads_like_a_schema(self, tmp_path):
        """huggingface/datasets#7664: the text of a field is taken for types of columns."""
        text = "### Describe the bug (...) ,action: string, datetime: timestamp[s], author: string"
        found = self.records(tmp_path / "a.jsonl", self.lines(lambda n: {"answer": text, "datetime": "2024-01-31"}))
        assert [record.answers for record in found] == [(text,)] * 40

    def test_two_requests_in_a_row(self, tmp_path):
        """vllm-project/vllm#6862: two messages of the user follow each other."""
        said = [("system", "s"), ("user", "one"), ("user", "two"), ("assistant", "three")]
        messages = [{"role": role, "content": text} for role, text in said]
        with pytest.raises(ConfigError, match="line 1: column 'messages': requests and answers don't take turns"):
            self.records(tmp_path / "a.jsonl", "\n".join([json.dumps({"messages": messages})] * 20))

    def test_a_template_without_a_system_prompt(self, tiny_model_dir):
        """EleutherAI/lm-evaluation-harness#2069: Gemma's template refuses the role that the data has."""
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        tokenizer.chat_template = (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        )
        assert chat_pieces(tokenizer, ["user"])
        with pytest.raises(CalibrationError, match=r"rendered \(System role not supported\); use chat 'never'"):
            chat_pieces(tokenizer, ["system", "user"])


class TestStudies:
    def test_a_second_run_of_the_same_command(self, tmp_path):
        """optuna/optuna#1865: the number of trials is that of the study, not of every run on its storage."""
        for _ in range(2):
            summary = tune(tuning(tmp_path, 4, sampler="random"), decode, true_loss, [])
            assert sum(summary.counts.values()) == 4

    def test_other_choices_in_a_study_that_goes_on(self, tmp_path):
        """optuna/optuna#2199: the study is reopened after its space was changed."""
        study = open_study(None, tmp_path, "tune", ["minimize"])
        keep_settings(study, {"densities": [0.25, 0.5]})
        with pytest.raises(ConfigError, match="densities"):
            keep_settings(study, {"densities": [0.25, 0.5, 0.75]})
