"""Chat templates around tokens."""

import random

import numpy as np
import pytest

from moa_search.data.frames import chat_frame, plain_frame
from moa_search.data.texts import TextSource
from moa_search.errors import CalibrationError
from moa_search.tasks import TASKS
from moa_search.tasks.items import Generator
from moa_search.tasks.turns import draw_round

BEFORE, AFTER = "<s><turn>user\n", "<end>\n<turn>assistant\n"


def draw(tokenizer, task, *, count=4, length=1000, free_room=None):
    source = TextSource.library(tokenizer, "validation")
    maker = Generator(TASKS[task], tokenizer, source, chat_frame(tokenizer), free_room)
    return draw_round({task: maker}, [task] * count, length, 0)[task]


def test_the_frame_is_what_the_template_writes(chat_tokenizer):
    frame = chat_frame(chat_tokenizer)
    assert chat_tokenizer.decode(frame.before) == BEFORE
    assert chat_tokenizer.decode(frame.after) == AFTER
    assert chat_tokenizer.decode(frame.end) == "<end>"
    assert frame.is_chat
    assert plain_frame(chat_tokenizer).before.tolist() == chat_tokenizer("<s>", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("task", ["passkey", "multikey"])
def test_keys_are_asked_for_within_a_turn_and_the_answers_start_is_given(chat_tokenizer, task):
    for item in draw(chat_tokenizer, task):
        sample = item.answered(item.reference)
        prompt, answer = chat_tokenizer.decode(sample.prompt), chat_tokenizer.decode(sample.answer)
        assert sample.length == sample.target_length == 1000
        assert prompt.startswith(BEFORE)
        asked, given = prompt.split(AFTER)
        assert asked.rpartition("\n\n")[2].startswith("What is the pass key")
        assert given.startswith("The pass key")
        assert given.endswith(" is")
        assert answer[0] == " "
        assert len(answer) == 6
        assert answer[1:].isdigit()


def test_questions_are_answered_freely_and_the_turns_end_is_supervised(chat_tokenizer):
    for item in draw(chat_tokenizer, "question"):
        sample = item.answered(item.reference)
        prompt, answer = chat_tokenizer.decode(sample.prompt), chat_tokenizer.decode(sample.answer)
        assert sample.length == 1000
        assert prompt.endswith("?" + AFTER)
        assert answer == item.accepted[0].strip() + "<end>"
        assert f"{answer.removesuffix('<end>')}." in prompt


def test_room_for_free_answers_is_kept(chat_tokenizer):
    for item in draw(chat_tokenizer, "question", free_room=50):
        assert len(item.prompt) == 950
        assert item.target_length == 1000
    for item in draw(chat_tokenizer, "passkey", free_room=50):
        assert len(item.prompt) == 994


def test_a_copy_is_never_a_chat(chat_tokenizer):
    plain = Generator(TASKS["copy"], chat_tokenizer, TextSource.library(chat_tokenizer, "validation"))
    for item, other in zip(
        draw(chat_tokenizer, "copy"), draw_round({"copy": plain}, ["copy"] * 4, 1000, 0)["copy"], strict=True
    ):
        assert item.prompt.tolist() == other.prompt.tolist()
        assert chat_tokenizer.decode(item.prompt).count("<turn>") == 0


def test_a_template_without_a_special_token_after_answers_ends_nothing(with_template):
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    frame = chat_frame(with_template(template))
    assert len(frame.end) == 0


def test_a_template_that_prints_the_date_gives_the_same_samples_tomorrow(with_template):
    template = "{{ date_string or today() }} {% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = with_template(template)
    assert tokenizer.decode(chat_frame(tokenizer).before) == "26 Jul 2024 "


CLOCKS = {
    "{{ strftime_now('%d %B %Y') }}": "26 July 2024",
    "{{ strftime_now(format='%Y-%m-%d') }}": "2024-07-26",
    "{{ strftime_now('%F %T, %A') }}": "2024-07-26 12:00:00, Friday",
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}no clock{% endif %}": "26 Jul 2024",
    "{% set today = strftime_now('%-d. %-m. %y') %}{% if today %}{{ today }}{% endif %}": "26. 7. 24",
    "{% macro head() %}\n{{ strftime_now('%c %p') }}\n{% endmacro %}{{ head() | trim }}": "Fri Jul 26 12:00:00 2024 PM",
    "{% for n in range(2) %}{{ strftime_now('%j%u') }};{% endfor %}": "2085;2085;",
}


@pytest.mark.parametrize("template", CLOCKS)
def test_a_template_that_reads_the_clock_is_given_a_fixed_day(with_template, template, monkeypatch):
    class NoClock:
        def now(*anything):
            raise AssertionError("the clock was read")

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", NoClock)
    tokenizer = with_template(template + "|{% for message in messages %}{{ message['content'] }}{% endfor %}")
    assert tokenizer.decode(chat_frame(tokenizer).before) == CLOCKS[template] + "|"


def test_a_fixed_day_changes_nothing_else_of_a_template(with_template):
    """Line ends at its start, which Jinja trims after blocks, included."""
    rest = "\n  {% for message in messages %}\n {{ message['content'] }}\n{% endfor %}\n"
    with_clock = chat_frame(with_template(rest + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"))
    assert with_clock.before.tolist() == chat_frame(with_template(rest)).before.tolist()


@pytest.mark.parametrize(
    "template", ["{{ range(100000) | random }}", "{{ ['a', 'b', 'c'] | random }}", "{{ lipsum(1) }}"]
)
def test_a_template_that_draws_gives_the_same_samples_again(with_template, template):
    tokenizer = with_template(template + "{% for message in messages %}{{ message['content'] }}{% endfor %}")
    random.seed(1)
    before = random.getstate()
    first = chat_frame(tokenizer).before.tolist()
    assert random.getstate() == before, "a caller's own draws go on as they would"
    random.seed(2)
    assert chat_frame(tokenizer).before.tolist() == first


def test_the_template_for_chats_is_taken_where_there_are_several(with_template):
    content = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = with_template({"default": "chat" + content, "tool_use": "tools" + content})
    assert tokenizer.decode(chat_frame(tokenizer).before) == "chat"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no messages", "gives a message 0 times instead of once; use chat 'never'"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "gives a message 2 times"),
        ("{{ messages[0]['content'] | upper }}", "gives a message 0 times"),
        ("{{ raise_exception('only\nimages') }}", r"can't be rendered \(only\\nimages\); use chat 'never'"),
        ("{% for %}", "can't be rendered"),
        ("{{ range(1000000) }}", r"can't be rendered \(Range too big"),
    ],
)
def test_templates_that_change_the_content_are_refused(with_template, template, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        chat_frame(with_template(template))
    assert "\n" not in str(caught.value)


def test_draws_do_not_depend_on_the_frame(chat_tokenizer):
    source = TextSource.library(chat_tokenizer, "validation")
    plain = Generator(TASKS["passkey"], chat_tokenizer, source)
    rngs = [np.random.default_rng(3) for _ in range(2)]
    in_chat = Generator(TASKS["passkey"], chat_tokenizer, source, chat_frame(chat_tokenizer))
    assert plain.draw(900, 0.5, rngs[0]).accepted == in_chat.draw(900, 0.5, rngs[1]).accepted
