"""What a sample is, and when two lists of samples count as the same."""

import dataclasses

import numpy as np
import pytest

from moa_search.data import Sample, hash_samples

SAMPLE = Sample(np.array([5, 6, 7, 8]), 1, "copy", 0.5, "topic:if")


def test_prompt_and_answer():
    assert SAMPLE.length == 4
    assert SAMPLE.prompt.tolist() == [5, 6, 7]
    assert SAMPLE.answer.tolist() == [8]


def test_the_length_asked_for_is_its_own_unless_told():
    assert SAMPLE.target_length == 4
    assert dataclasses.replace(SAMPLE, target_length=9).target_length == 9
    with pytest.raises(AssertionError):
        dataclasses.replace(SAMPLE, target_length=3)


def test_hash_tells_what_a_model_would_be_trained_on():
    other = dataclasses.replace(SAMPLE, ids=np.array([5, 6, 7, 9]))
    differing = [
        [],
        [SAMPLE],
        [other],
        [SAMPLE, other],
        [other, SAMPLE],
        [dataclasses.replace(SAMPLE, answer_tokens=2)],
        [dataclasses.replace(SAMPLE, task="passkey")],
    ]
    assert len({hash_samples(samples) for samples in differing}) == len(differing)
    assert hash_samples([SAMPLE]) == hash_samples([dataclasses.replace(SAMPLE, ids=SAMPLE.ids.copy())])
