"""How a source is typed."""

import pytest

from moa_search import profile_model
from moa_search.data import SourceSpec
from moa_search.errors import ConfigError
from moa_search.tasks import parse_source


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("passkey", {"task": "passkey"}),
        ("question:books.txt", {"task": "question", "data": "books.txt"}),
        ("rajpurkar/squad", {"task": "records", "data": "rajpurkar/squad"}),
        (
            "records:a/b?subset=en&split=train[:100]+test&context=passage&answer=gold",
            {
                "task": "records",
                "data": "a/b",
                "subset": "en",
                "split": "train[:100]+test",
                "columns": {"context": "passage", "answer": "gold"},
            },
        ),
        ("copy:x.jsonl?text=body", {"task": "copy", "data": "x.jsonl", "columns": {"text": "body"}}),
        ("samples:/made/before", {"task": "samples", "data": "/made/before"}),
    ],
)
def test_what_is_typed(text, spec):
    assert parse_source(text) == SourceSpec(text, **spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paskey:x.txt", r"'paskey' is unknown \(did you mean 'passkey'\?\); choose from passkey, copy, multikey"),
        ("perplexity", "perplexity can be evaluated, not calibrated on; choose from passkey, copy"),
        ("perplexity:x.txt", "perplexity can be evaluated, not calibrated on"),
        ("passkey:", "data is missing; write passkey: and a file"),
        ("records", "data is missing; write records: and a file"),
        ("", "data is missing"),
        ("records:x.jsonl?question", "'question' is not key=value"),
        ("records:x.jsonl?question=", "'question=' is not key=value"),
        ("records:x.jsonl?", "'' is not key=value"),
        ("records:x.jsonl?questoin=q", r"key 'questoin' is unknown \(did you mean 'question'\?\)"),
        ("copy:x.jsonl?answer=a", "key 'answer' is unknown; choose from subset, split, text"),
        ("records:x.jsonl?split=a&split=b", "key 'split' stands twice"),
        ("passkey?text=a", "key 'text' is unknown; it takes none"),
        ("samples:x?split=train", "key 'split' is unknown; it takes none"),
    ],
)
def test_refusals_name_the_source(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_source(text)
    assert f"source {text!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_that_is_none_is_refused_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match=r"'paskey' is unknown \(did you mean 'passkey'\?\)"):
        profile_model("no/such/model", lengths=[128], samples=1, sources=["passkey", "paskey:x.txt"])
