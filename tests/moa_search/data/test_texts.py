"""The texts of the three splits."""

import itertools

import numpy as np
import pytest

from moa_search.data import SPLITS, texts
from moa_search.data.texts import TextSource, documents
from moa_search.errors import CalibrationError


def test_splits_share_no_document():
    names = [name for split in SPLITS for name, _ in documents(split)]
    assert len(names) == len(set(names))


def test_splits_share_no_paragraph():
    """Help topics quote each other, whole sections at a time."""
    long_ones = [
        {
            " ".join(paragraph.split())
            for _, text in documents(split)
            for paragraph in text.split("\n\n")
            if len(" ".join(paragraph.split())) >= 100
        }
        for split in SPLITS
    ]
    for one, two in itertools.combinations(long_ones, 2):
        assert one & two == set()


@pytest.mark.parametrize("split", SPLITS)
def test_every_split_has_text_for_long_samples(split):
    assert sum(len(text) for _, text in documents(split)) > 300_000
    assert len(documents(split)) > 20


@pytest.fixture
def other_python(monkeypatch):
    """A Python that lacks most of the modules, and has one that this one lacks."""
    monkeypatch.setattr(texts, "MODULES", "ast typing turtle no_such_module pickle")
    documents.cache_clear()
    yield
    documents.cache_clear()


def test_a_texts_split_does_not_depend_on_the_other_modules(request):
    before = {name: split for split in SPLITS for name, _ in documents(split)}
    request.getfixturevalue("other_python")
    after = {name: split for split in SPLITS for name, _ in documents(split)}
    assert {"module:ast", "module:typing", "module:turtle", "module:pickle"} <= after.keys()
    assert "module:no_such_module" not in after
    assert {name: before[name] for name in after.keys() & before.keys()} == {
        name: after[name] for name in after.keys() & before.keys()
    }


class TestCut:
    @pytest.fixture
    def source(self, plain_tokenizer):
        """Three short texts of one token per letter."""
        return TextSource(plain_tokenizer, (("a", "abcdefgh"), ("b", "ijk"), ("c", "lmnopq")), "the test texts")

    @pytest.mark.parametrize("length", [1, 3, 7, 12, 17])
    def test_an_exact_stretch_that_goes_on_with_the_next_texts(self, source, plain_tokenizer, length):
        rng = np.random.default_rng(0)
        around = "abcdefghijklmnopqabcdefghijklmnopq"
        starts = set()
        for _ in range(30):
            name, tokens = source.cut(length, rng)
            text = plain_tokenizer.decode(tokens)
            assert len(text) == length
            assert text in around
            assert name == ("a" if text[0] < "i" else "b" if text[0] < "l" else "c")
            starts.add(text[0])
        assert len(starts) >= 3 or length == 17
        assert starts <= set("abcdefghijklmnopq")

    def test_more_than_there_is(self, source):
        with pytest.raises(CalibrationError, match=r"18 tokens of text are needed; .* test texts have 17"):
            source.cut(18, np.random.default_rng(0))
