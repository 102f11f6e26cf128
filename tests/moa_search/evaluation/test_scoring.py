"""Teacher-forced scores against a plain forward pass."""

import numpy as np
import torch

from moa_search.data import Sample
from moa_search.evaluation.scoring import score_answer


def test_nll_and_hits_are_those_of_the_answers_tokens(tiny_model):
    model, _ = tiny_model
    sample = Sample(np.random.default_rng(0).integers(0, 256, 60), 7, "copy", 0.5, "")
    ids = torch.from_numpy(sample.ids)[None]
    with torch.no_grad():
        log_probabilities = model(input_ids=ids).logits[0].log_softmax(-1)
    before_each = range(60 - 8, 60 - 1)
    expected = [-log_probabilities[at, ids[0, at + 1]].item() for at in before_each]
    answer = score_answer(model, sample)
    np.testing.assert_allclose(answer.nll, np.mean(expected), rtol=1e-5)
    assert answer.correct.tolist() == [bool(log_probabilities[at].argmax() == ids[0, at + 1]) for at in before_each]


def test_greedy_continuation_is_all_correct(tiny_model):
    """All tokens ranked first is the same event as greedy decoding printing the answer."""
    model, _ = tiny_model
    prompt = torch.from_numpy(np.random.default_rng(1).integers(0, 256, 40))[None]
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0].numpy()
    assert score_answer(model, Sample(generated, 6, "copy", 0.5, "")).correct.all()
    wrong = generated.copy()
    wrong[42] = (wrong[42] + 1) % 256
    assert score_answer(model, Sample(wrong, 6, "copy", 0.5, "")).correct.tolist()[:3] == [True, True, False]
