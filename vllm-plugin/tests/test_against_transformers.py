"""Tokens of vLLM under a plan are those of transformers under the same plan, whatever the scheduler does meanwhile."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from engines import Engine, Reference, Tokens, Trace, text_tokens

LENGTHS = (30, 77, 200, 350, 610, 900, 1400, 2500)
NEW = 16
ENGINE = {"max_num_batched_tokens": 512, "kv_cache_memory_bytes": 2**28}


@pytest.fixture(scope="module")
def reference(demo_folder: str, plans: Path) -> Reference:
    return Reference(demo_folder, plans / "quarter.json")


@pytest.fixture(scope="module")
def text(demo_folder: str) -> Tokens:
    return text_tokens(demo_folder)


def test_a_mix_of_lengths_in_chunks(engine: Engine, reference: Reference, text: Tokens) -> None:
    prompts = [text[97 * i : 97 * i + length] for i, length in enumerate(LENGTHS)]
    trace = engine.run(prompts, NEW)
    assert trace.running == len(LENGTHS)
    assert trace.tokens == reference.run_each(prompts, NEW)
    assert engine.used_blocks == 0


def test_a_preempted_request(engine: Engine, reference: Reference, text: Tokens) -> None:
    prompts = [text[3000 + 300 * i :][:100] for i in range(6)]
    managers = engine.manager.coordinator.single_type_managers
    needed = len(prompts) * sum(manager.kv_cache_spec.blocks_held(100) for manager in managers)
    with engine.small_pool(needed + 5):  # the prompts fit, their answers don't
        trace = engine.run(prompts, 60)
    assert trace.preempted
    assert trace.tokens == reference.run_each(prompts, 60)
    assert engine.used_blocks == 0


def test_the_next_turn_finds_all_before_it(engine: Engine, reference: Reference, text: Tokens) -> None:
    prompt = text[8000:8700]
    first = engine.run([prompt], NEW).answers["0"].tokens
    turn = [*prompt, *first, *text[50:80]]
    answer = engine.run([turn], NEW).answers["0"]
    assert answer.cached == (len(prompt) + NEW - 1) // 16 * 16  # the last token's keys were never computed
    assert answer.tokens == reference.run(turn, NEW)


def test_another_end_of_an_earlier_prompt_is_right_with_and_without_a_hit(
    engine: Engine, reference: Reference, text: Tokens
) -> None:
    prompt = text[9000:9700]
    engine.run([prompt], 1)
    branch = [*prompt[:400], *text[300:350]]
    expected = reference.run(branch, NEW)
    hit = engine.run([branch], NEW).answers["0"]
    assert hit.cached == 400
    assert hit.tokens == expected
    # What the plan dropped in the middle of the prompt is gone once other requests have taken the memory.
    fillers = [text[11000 + 700 * i :][:700] for i in range(3)]
    with engine.small_pool(1200):
        engine.run(fillers, 1)
        late = engine.run([branch], NEW).answers["0"]
    assert late.tokens == expected


def test_several_answers_to_one_prompt_and_their_log_probabilities(
    engine: Engine, reference: Reference, text: Tokens
) -> None:
    import torch
    from vllm import SamplingParams

    prompt = text[5000:5210]
    params = SamplingParams(n=3, temperature=0.8, seed=3, max_tokens=8, logprobs=1, ignore_eos=True)
    outputs = engine.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs
    assert len({tuple(output.token_ids) for output in outputs}) > 1
    for output in outputs:
        tokens = list(output.token_ids)
        with torch.no_grad():
            logits = reference.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(tokens)), tokens]
        found = torch.tensor([entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)])
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert engine.used_blocks == 0


def test_requests_that_come_and_are_given_up_leave_nothing_behind(engine: Engine, text: Tokens) -> None:
    """200 requests that share beginnings, a third of them aborted somewhere, in a pool that is too small for all."""
    rng = random.Random(0)
    jobs = [
        (text[start : start + rng.randrange(2, 60)], rng.randrange(1, 6))
        for start in (16 * rng.randrange(40) for _ in range(200))
    ]
    waiting, live, trace, aborted = list(range(200)), [], Trace(), 0
    with engine.small_pool(400):
        while waiting or engine.engine.has_unfinished_requests():
            for _ in range(min(rng.randrange(12), len(waiting))):
                live.append(waiting.pop())
                engine.add(str(live[-1]), *jobs[live[-1]])
            engine.step(trace)
            live = [number for number in live if str(number) not in trace.answers]
            for _ in range(min(rng.randrange(4), len(live))):
                engine.engine.abort_request([str(live.pop(rng.randrange(len(live))))])
                aborted += 1
    assert engine.used_blocks == 0
    assert 40 < aborted < 120
    assert len(trace.answers) == 200 - aborted
    for name in rng.sample(sorted(trace.answers), 12):
        prompt, new = jobs[int(name)]
        engine.manager.reset_prefix_cache()
        assert trace.answers[name].tokens == engine.run([prompt], new).answers["0"].tokens
