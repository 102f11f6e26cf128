"""Messages, prompts and completions as people store them."""

import contextlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moa_search.data import SPLITS
from moa_search.data.conversations import Conversation
from moa_search.data.loading import Record, load_records
from moa_search.errors import CalibrationError, ConfigError
from moa_search.tasks import parse_source


def turns(n, *texts):
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": f"{text} {n}"} for role, text in zip(roles, texts, strict=False)]


def loaded(path, rows, **options):
    """All conversations of a file of these rows, by the number in them."""
    path.write_text("\n".join(map(json.dumps, rows)))
    return of(str(path), **options)


def of(typed, answers=True):
    sides = []
    for split in SPLITS:
        with contextlib.suppress(CalibrationError):  # none for this side
            sides.append(load_records(parse_source(typed), split, answers=answers))
    found = {conversation.document.rpartition("#")[2]: conversation for side in sides for conversation in side}
    assert all(isinstance(conversation, Conversation) for conversation in found.values())
    return found


SYSTEM = {"role": "system", "content": "Be kind."}
SAID = [turns(n, "one", "two", "three", "four") for n in range(20)]
OPENAI = [{"messages": [SYSTEM, *said]} for said in SAID]
NAMES = {"user": "human", "assistant": "gpt"}
SHAREGPT = [{"conversations": [{"from": NAMES[m["role"]], "value": m["content"]} for m in said]} for said in SAID]
EXPECTED = (("user", "one 3"), ("assistant", "two 3"), ("user", "three 3"))


def test_openai_s_and_sharegpt_s_form_are_one(tmp_path):
    one = loaded(tmp_path / "a.jsonl", OPENAI)["3"]
    assert one.messages == (("system", "Be kind."), *EXPECTED)
    assert one.answer == "four 3"
    two = loaded(tmp_path / "b.jsonl", SHAREGPT)["3"]
    assert (two.messages, two.answer) == (EXPECTED, "four 3")


def test_parts_of_text_and_other_names_of_roles(tmp_path):
    rows = [
        {"conversation": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": f"a{n}"}, {"type": "text", "text": "b"}]},
            {"from": "model", "value": f"c{n}"},
        ]}
        for n in range(20)
    ]  # fmt: skip
    one = loaded(tmp_path / "a.jsonl", rows)["3"]
    assert one.messages == (("system", "Be kind."), ("user", "a3\nb"))
    assert one.answer == "c3"


@pytest.mark.parametrize("lists", [False, True])
def test_prompts_with_completions(tmp_path, lists):
    rows = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(20)]
    if lists:
        rows = [{"prompt": turns(n, "one", "two", "three"), "completion": turns(n, "", "four")[1:]} for n in range(20)]
    one = loaded(tmp_path / "a.jsonl", rows)["3"]
    assert (one.messages, one.answer) == ((EXPECTED, "four 3") if lists else ((("user", "p3"),), "c3"))
    renamed = [{"p": row["prompt"], "c": row["completion"]} for row in rows]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    assert of(f"{tmp_path}/b.jsonl?prompt=p&completion=c")["3"].messages == one.messages


def test_parquet_has_messages_as_structs(tmp_path):
    rows = [{"messages": [{**m, "tool_calls": None} for m in row["messages"]]} for row in OPENAI]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert of(f"{tmp_path}/a.parquet")["3"].answer == "four 3"


def test_rows_of_questions_stay_questions(tmp_path):
    rows = [{"context": f"c{n}", "question": "q", "answer": "a", "messages": turns(n, "one", "two")} for n in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    typed = str(tmp_path / "a.jsonl")
    assert isinstance(load_records(parse_source(typed), "test", answers=True)[0], Record)
    assert of(f"{typed}?messages=messages")["3"].answer == "two 3"


def test_what_is_left_out(tmp_path):
    rows = [{"messages": turns(n, "one", "two")} for n in range(20)]
    rows[0]["messages"].append({"role": "user", "content": "no answer"})
    rows[1]["messages"].insert(0, {"role": "assistant", "content": "nothing was asked"})
    rows[2]["messages"][0]["content"] = "  "
    rows[3]["messages"] = rows[3]["messages"][:1]
    rows[4]["messages"] = None
    rows[5]["messages"].insert(0, {"role": "system", "content": ""})
    found = loaded(tmp_path / "a.jsonl", rows)
    assert set(found) == {str(n) for n in range(20)} - {"2", "3", "4"}
    assert found["0"].messages == (("user", "one 0"),)
    assert found["1"].messages == (("user", "one 1"),)
    assert found["5"].messages == (("user", "one 5"),)
    unanswered = of(str(tmp_path / "a.jsonl"), answers=False)
    assert unanswered["0"].messages[-1] == ("user", "no answer")
    assert unanswered["0"].answer == ""
    assert unanswered["3"].messages == (("user", "one 3"),)


def test_a_long_system_prompt_that_all_share_keeps_no_side_empty(tmp_path):
    system = {"role": "system", "content": "Be kind to all. " * 20}
    assert len(loaded(tmp_path / "a.jsonl", [{"messages": [system, *said]} for said in SAID])) == 20


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tool", "content": "x"}, r"message 2 has the role 'tool'; known are system, developer"),
        ({"content": "x"}, "message 2 has the role None"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}, "message 2 calls tools; only texts"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}, "message 2 holds something else"),
        ({"role": "assistant", "content": None}, "message 2 holds something else"),
        ({"role": "user", "content": "again"}, "requests and answers don't take turns"),
        ({"role": "system", "content": "late"}, "requests and answers don't take turns"),
        ("text", "message 2 is no object with role and content"),
        ({"role": "assistant", "content": "\ud800"}, "holds half a surrogate pair"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_with_its_row(tmp_path, message, says):
    rows = [{"messages": turns(n, "one", "two")} for n in range(3)]
    rows[1]["messages"][1] = message
    with pytest.raises(ConfigError, match=f"a.jsonl, line 2: column 'messages'.* {says}") as caught:
        loaded(tmp_path / "a.jsonl", rows)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ({"messages": "hello"}, "", "column 'messages': is no list of messages but str"),
        ({"prompt": "p", "answer": "a"}, "?completion=gold", "no column gold; it has prompt, answer"),
        ({"prompt": "p"}, "", "no column context or passage"),
        ({"context": "c", "question": "q", "answer": "a"}, "?turns=all", "turns=all is for conversations"),
        ({"messages": []}, "?turns=some", "turns 'some' is unknown; choose from last, all"),
    ],
)
def test_refusals(tmp_path, row, options, says):
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=says):
        load_records(parse_source(f"{tmp_path}/a.jsonl{options}"), "test", answers=True)
