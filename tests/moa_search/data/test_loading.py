"""Local files as texts and records, and their sides."""

import json

import datasets
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa_search.data import SPLITS
from moa_search.data.loading import load_records, load_texts
from moa_search.data.texts import of_split, squeezed
from moa_search.errors import CalibrationError, ConfigError
from moa_search.tasks import parse_source


def write(path, rows):
    """``rows`` in the format that the path's ending says."""
    frame = pd.DataFrame(rows)
    if path.suffix in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def records_of(typed, split="calibration", **options):
    return load_records(parse_source(typed), split, **{"answers": True, **options})


def texts_of(typed, split="calibration"):
    return load_texts(parse_source(typed), split)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "a.tsv"])
def test_records_of_every_kind_of_file(tmp_path, records, name):
    file = write(tmp_path / name, records)
    found = {split: records_of(file, split) for split in SPLITS}
    assert sorted(record.question for some in found.values() for record in some) == sorted(
        r["question"] for r in records
    )
    by_question = {row["question"]: row for row in records}
    for record in found["calibration"]:
        assert record.context == by_question[record.question]["context"]
        assert record.answers == (by_question[record.question]["answer"],)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_texts_of_every_kind_of_file(tmp_path, records, name):
    file = write(tmp_path / name, [{"id": n, "text": row["context"]} for n, row in enumerate(records)])
    found = [text for split in SPLITS for _, text in texts_of(f"passkey:{file}", split)]
    assert sorted(found) == sorted(row["context"] for row in records)


def test_a_text_file_is_cut_into_sections_so_that_every_split_has_some(tmp_path):
    book = "".join(f"Line {n} of a long book about nothing.\n" for n in range(4000))
    (tmp_path / "book.txt").write_text(book)
    found = [texts_of(f"copy:{tmp_path}/book.txt", split) for split in SPLITS]
    assert all(found)
    sections = [entry for side in found for entry in side]
    assert "".join(text for _, text in sorted(sections, key=lambda entry: int(entry[0].rpartition(".")[2]))) == book
    assert texts_of(f"copy:{tmp_path}/*.txt") == texts_of(f"copy:{tmp_path}/*.txt")


def test_folders_of_files_and_saved_data_sets(tmp_path, records):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "one.jsonl", records[:20])
    write(tmp_path / "files" / "two.jsonl", records[20:])
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    one, two = (records_of(f"records:{tmp_path}/{name}") for name in ("files", "saved"))
    assert [record.question for record in one] == [record.question for record in two]


@pytest.mark.parametrize("typed", ["copy:{}", "copy:{}/*"])
def test_a_folder_of_books_holds_sections_not_lines(tmp_path, typed):
    books = tmp_path / "books"
    books.mkdir()
    for name in ("one.txt", "two.md"):
        (books / name).write_text("".join(f"{name} says line {i} of many\n" for i in range(2000)))
    found = [text for split in SPLITS for _, text in texts_of(typed.format(books), split)]
    assert 10 < len(found) < 40, "4000 lines in sections, so that every split has some"


def test_a_saved_data_set_in_the_home_folder(tmp_path, records, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    assert records_of("records:~/saved")


def test_columns_by_name_and_by_default(tmp_path):
    rows = [{"passage": f"p{n}", "query": f"q{n}", "gold": f"g{n}", "note": f"n{n}"} for n in range(20)]
    file = write(tmp_path / "a.jsonl", rows)
    record = records_of(f"{file}?answer=gold")[0]
    assert (record.context[0], record.question[0], record.answers[0][0]) == ("p", "q", "g")
    record = records_of(f"{file}?answer=gold&context=note")[0]
    assert record.context[0] == "n"


def test_answers_as_squad_lists_and_numbers_have_them(tmp_path):
    rows = [
        {
            "context": f"c{n}",
            "question": "q",
            "answers": {"text": [f"a{n}", "other", f"a{n}"], "answer_start": [0, 1, 2]},
        }
        for n in range(10)
    ]
    assert records_of(write(tmp_path / "squad.jsonl", rows))[0].answers[1:] == ("other",)
    lists = [{"context": [f"c{n}", "d"], "question": "q", "answers": ["x", "y"]} for n in range(10)]
    (found, *_) = records_of(write(tmp_path / "lists.jsonl", lists))
    assert found.answers == ("x", "y")
    assert found.context.endswith("\nd")
    numbers = [{"context": f"c{n}", "question": "q", "answer": 7} for n in range(10)]
    assert records_of(write(tmp_path / "numbers.jsonl", numbers))[0].answers == ("7",)


def test_rows_without_question_or_answer_are_left_out(tmp_path):
    rows = [{"context": "c", "question": "q", "answer": "a"}] * 3
    rows += [{"context": "c", "question": " ", "answer": "a"}, {"context": "c", "question": "q", "answer": ""}]
    file = write(tmp_path / "a.jsonl", rows)
    found = [record for split in SPLITS for record in _or_nothing(file, split)]
    assert len(found) == 3


def _or_nothing(file, split):
    try:
        return records_of(file, split)
    except CalibrationError:
        return ()


def test_answers_are_needed_only_where_the_data_has_to_give_them(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"context": f"c{n}", "question": "q"} for n in range(10)])
    assert records_of(file, answers=False)[0].answers == ()
    with pytest.raises(
        ConfigError, match=r"no column answer or answers or .*; it has context, question; name one with answer="
    ):
        records_of(file)


def test_questions_about_one_context_are_on_one_side(tmp_path):
    rows = [{"context": f"context {n % 8}" + "  " * (n // 8), "question": f"q{n}", "answer": "a"} for n in range(40)]
    file = write(tmp_path / "a.jsonl", rows)
    sides = [{squeezed(record.context) for record in _or_nothing(file, split)} for split in SPLITS]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 8


WORDS = st.lists(st.sampled_from(["one", "two", "three", "four"]), min_size=1, max_size=4).map(" ".join)
PARAGRAPHS = st.one_of(WORDS, WORDS.map(lambda words: f"{words} " * 30))
TEXTS = st.lists(st.lists(PARAGRAPHS, min_size=1, max_size=3).map("\n\n".join), max_size=12)


@given(TEXTS)
def test_splits_share_neither_texts_nor_long_paragraphs(texts):
    named = [(str(n), text) for n, text in enumerate(texts)]
    sides = [of_split(named, split, key=lambda name, text: squeezed(text)) for split in SPLITS]
    for one in range(3):
        for two in range(one):
            assert {squeezed(text) for _, text in sides[one]}.isdisjoint(squeezed(text) for _, text in sides[two])
            assert long_paragraphs(sides[one]).isdisjoint(long_paragraphs(sides[two]))


@given(TEXTS.filter(len))
def test_other_texts_never_move_one_into_another_split(texts):
    named = [(str(n), text) for n, text in enumerate(texts)]
    side = {text: split for split in SPLITS for _, text in of_split(named, split, key=lambda name, text: text)}
    for text in texts:
        alone = [split for split in SPLITS if of_split([("", text)], split, key=lambda name, text: text)]
        assert side.get(text, alone[0]) == alone[0]


def long_paragraphs(side):
    return {squeezed(part) for _, text in side for part in text.split("\n\n") if len(squeezed(part)) >= 100}


@pytest.mark.parametrize(
    ("typed", "content", "message"),
    [
        ("passkey:{}/missing.txt", "", "missing.txt doesn't exist"),
        ("passkey:{}/none/*.txt", "", "doesn't exist"),
        ("records:{}/a.docx", "x", ".docx is not one of .jsonl, .ndjson, .json, .parquet"),
        (
            "records:{}/a.jsonl",
            '{"context": "c"}\n nonsense',
            r"can't be read: .*a.jsonl, line 2: is not a JSON value on one line \(Expecting value\)",
        ),
        ("records:{}/a.parquet", "nonsense", "can't be read: .*a.parquet: Parquet magic bytes"),
        ("records:{}/a.jsonl", "", "can't be read: .*a.jsonl is empty"),
        ("records:{}/a.csv", "", "can't be read: .*a.csv is empty"),
        ("records:{}/a.jsonl?split=test", '{"context": "c"}', 'can\'t be read: Unknown split "test"'),
        ("records:{}/a.jsonl?context=contxt", '{"context": "c"}', r"no column contxt \(did you mean 'context'\?\)"),
        ("records:{}/a.jsonl", '{"x": "c", "y": 1}', "no column context or passage or .*; it has x, y; name one with"),
        ("records:{}/a.jsonl", '{"context": {"a": 1}, "question": "q", "answer": "a"}', "'context' holds dict values"),
        ("records:{}/a.jsonl?context=q&question=q", '{"q": "c", "answer": "a"}', "not three columns"),
        ("records:{}/*", "several kinds", r"files of several kinds \(\.csv, \.jsonl\)"),
        ("passky", "", r"can't be read: .* \(did you mean 'passkey'\?\)"),
        ("records:someone/nothing-of-this-name", "", "can't be read: Couldn't reach"),
    ],
)
def test_refusals_in_one_line(tmp_path, typed, content, message, capfd):
    path = tmp_path / typed.partition("?")[0].rpartition("/")[2]
    if "several kinds" in message:
        for ending in (".csv", ".jsonl"):
            (tmp_path / f"a{ending}").write_text(content)
    elif content or "empty" in message:
        path.write_text(content)
    source = typed.format(tmp_path)
    load = texts_of if source.startswith("passkey") else records_of
    with pytest.raises(ConfigError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    assert source in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_split_without_documents(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"text": "just one"}])
    with pytest.raises(CalibrationError, match=r"has 1 documents, none of them for (calibration|validation)"):
        [texts_of(f"passkey:{file}", split) for split in SPLITS]
