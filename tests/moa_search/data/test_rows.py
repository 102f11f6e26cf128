"""Files are read as they are written: no type, no missing value, no line end and no row is a reader's guess."""

import csv
import functools
import gzip
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moa_search.data.finding import find
from moa_search.data.loading import load_records, load_texts
from moa_search.data.rows import READERS, read_text
from moa_search.errors import ConfigError
from moa_search.tasks import parse_source

CELLS = [
    *["00123", "1.0", "1.10", "7e5", "-0", "0x1F", "12345678901234567890123", "1_000", "1,5", "+49 30 1234", "inf"],
    *["true", "True", "no", "None", "NA", "N/A", "nan", "NULL", "null", "#N/A", "-", "<NA>"],
    *["2024-01-31", "2024-01-31T12:00:00Z", "12:30", "3 days", "1/2", "Jan 5"],
    *['say "hi"', "'", "a\nb", "a\r\nb", "a\rb", "tab\there", "a;b", "\\N", "naïve ☃ 日本", "a\u2028b\x85c", " edge "],
]
"""What readers of tables like to take for numbers, truth values, dates, missing values or the end of a row."""

SOURCES = [
    *["a.csv", "a.tsv", "a.jsonl", "a.ndjson", "a.json", "a.parquet", "saved", "repository"],
    *["a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "a.json.zst"],
]


PLAIN = [name for name in SOURCES if not name.endswith((".parquet", ".gz", ".zst"))]

COMPRESS = {
    ".gz": functools.partial(gzip.compress, mtime=0),
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def write(path, cells):
    """Rows with these answers, in the format that the path's name says; returns the file that holds them."""
    rows = [{"context": f"context {n}", "question": f"q{n}", "answer": cell} for n, cell in enumerate(cells)]
    if path.suffix in COMPRESS:
        plain = write(path.with_suffix(""), cells)
        path.write_bytes(COMPRESS[path.suffix](plain.read_bytes()))
        plain.unlink()
        return path
    ending = path.suffix.removeprefix(".") or path.name
    if ending in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["context", "question", "answer"], delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
        return next(path.glob("*.arrow"))
    elif ending == "repository":
        path.mkdir(exist_ok=True)
        (path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n---\n")
        return write(path / "rows.csv", cells)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) if ending != "json" else f"[{', '.join(lines)}]", encoding="utf-8")
    return path


def answers_in(path):
    """All answers, whatever their side."""
    (part,) = find(parse_source(f"records:{path}")).parts
    rows, start, stop = part
    return list(rows.column("answer"))[start:stop]


@pytest.mark.parametrize("name", SOURCES)
def test_every_cell_is_its_text(tmp_path, name):
    write(tmp_path / name, CELLS)
    assert answers_in(tmp_path / name) == CELLS


@pytest.mark.parametrize("name", [name for name in SOURCES if name in PLAIN])
def test_what_is_read_is_what_the_file_holds_now(tmp_path, name):
    """The same name, size and time of change, as `cp -p` or a quick edit leaves them, but other rows."""
    file = write(tmp_path / name, ["old"] * 9)
    assert set(answers_in(tmp_path / name)) == {"old"}
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content.replace(b"old", b"new"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(content) == times.st_size == file.stat().st_size
    assert set(answers_in(tmp_path / name)) == {"new"}
    file.unlink()
    with pytest.raises(ConfigError, match="can't be read"):
        answers_in(tmp_path / name)


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in PLAIN])
def test_a_compressed_file_that_was_replaced(tmp_path, name):
    path = write(tmp_path / name, ["old"] * 9)
    assert set(answers_in(path)) == {"old"}
    times = path.stat()
    write(path, ["new"] * 9)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert set(answers_in(path)) == {"new"}


def accepted(path, **options):
    sides = ("calibration", "validation", "test")
    found = [record for side in sides for record in load_records(parse_source(f"records:{path}"), side, answers=True)]
    return {record.question: record.answers for record in found}


def test_json_values_without_quotes_keep_their_digits(tmp_path):
    written = ["7.0", "1e5", "1.10", "12345678901234567890123", "-0", "true", "false", "[1.50, true]"]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(f'{{"context": "c{i % 9}", "question": "{i}", "answer": {written[i % 8]}}}\n' for i in range(72))
    )
    found = accepted(path)
    assert {found[str(i)] for i in range(72)} == {*((text,) for text in written[:7]), ("1.50", "true")}


def test_types_may_change_and_columns_appear_in_any_row(tmp_path):
    """Beyond the first megabytes, too, from which other readers infer a type."""
    rows = [
        {"context": f"{i} " + "long " * 3000, "question": str(i), "answer": i if i < 700 else f"A{i}"}
        for i in range(900)
    ]
    rows[-1]["extra"] = {"new": True}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert path.stat().st_size > 10e6
    assert accepted(path) == {row["question"]: (str(row["answer"]),) for row in rows}


def test_parquet_values_are_written_as_their_own_type_writes_them(tmp_path):
    columns = {
        "float32": (pa.array(np.full(20, 0.1, np.float32)), "0.1"),
        "float16": (pa.array(np.full(20, 0.1, np.float16)), "0.1"),
        "float64": (pa.array([0.1] * 20), "0.1"),
        "decimal": (pa.array(["1.10"] * 20).cast(pa.decimal128(5, 2)), "1.10"),
        "lists": (pa.array([[0.1]] * 20, pa.list_(pa.float32())), "0.1"),
        "truth": (pa.array([True] * 20), "true"),
        "large": (pa.array(["007"] * 20, pa.large_string()), "007"),
        "dictionary": (pa.array(["007"] * 20).dictionary_encode(), "007"),
    }
    rows = {"context": [f"c{n}" for n in range(20)], "question": ["q"] * 20, **{k: v for k, (v, _) in columns.items()}}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    for name, (_, text) in columns.items():
        assert accepted(f"{tmp_path}/a.parquet?answer={name}") == {"q": (text,)}


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_ends_and_byte_order_marks_are_no_content(tmp_path, ending):
    lines = ["context,question,answer", *(f"c{n},q{n},{n:03}" for n in range(20))]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + (ending.join(lines) + ending).encode())
    assert answers_in(tmp_path / "a.csv") == [f"{n:03}" for n in range(20)]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + ending.join(["one", "", "two"]).encode())
    assert read_text(tmp_path / "a.txt") == "one\n\ntwo"
    if ending != "\r":
        rows = ['{"answer": "007"}', "", '{"answer": "x"}']
        (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + ending.join(rows).encode())
        assert list(READERS[".jsonl"](tmp_path / "a.jsonl").column("answer")) == ["007", "x"]


def test_cells_longer_than_the_csv_module_takes_by_default(tmp_path):
    before = csv.field_size_limit()
    write(tmp_path / "a.csv", ["x" * 300_000])
    assert answers_in(tmp_path / "a.csv") == ["x" * 300_000]
    assert csv.field_size_limit() == before


def test_windows_line_ends_do_not_hide_paragraphs_that_two_sides_share(tmp_path):
    shared = "The same long paragraph stands in each of these texts, so that only one side may have it, as ever. " * 2
    rows = [{"text": f"Text {n}.{end}{end}{shared}"} for n, end in enumerate(["\n", "\r\n"] * 20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = parse_source(f"passkey:{tmp_path}/a.jsonl")
    assert load_texts(spec, "calibration")
    with pytest.raises(Exception, match="none of them for test"):
        load_texts(spec, "test")


class TestNamesAreNoPatterns:
    ROWS = "context,question,answer\n" + "".join(f"c{n},q{n},{n}\n" for n in range(9))

    @pytest.mark.parametrize("name", ["part[1].csv", "a*b.csv", "a[!b].csv", "x{1}.csv", "train[:3].csv"])
    def test_of_a_file(self, tmp_path, name):
        (tmp_path / name).write_text(self.ROWS)
        for other in ("part1.csv", "aXb.csv", "ac.csv", "x1.csv"):
            (tmp_path / other).write_text(self.ROWS.replace("c", "other"))
        (part,) = find(parse_source(f"records:{tmp_path}/{name}")).parts
        assert part[0].file == str(tmp_path / name)

    def test_of_one_that_is_not_there(self, tmp_path):
        (tmp_path / "part1.csv").write_text(self.ROWS)
        with pytest.raises(ConfigError, match=r"part\[1\]\.csv doesn't exist"):
            find(parse_source(f"records:{tmp_path}/part[1].csv"))

    def test_of_a_folder(self, tmp_path):
        for name in ("set[1]", "set1"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a[2].csv").write_text(self.ROWS.replace("c", name))
        (part,) = find(parse_source(f"records:{tmp_path}/set[1]")).parts
        assert part[0].file == f"{tmp_path}/set[1]/a[2].csv"

    def test_of_a_saved_data_set(self, tmp_path):
        write(tmp_path / "saved", ["other"])
        (tmp_path / "saved").rename(tmp_path / "set1")
        write(tmp_path / "saved", ["mine"])
        (tmp_path / "saved").rename(tmp_path / "set[1]")
        assert answers_in(tmp_path / "set[1]") == ["mine"]

    def test_of_a_copy_of_a_repository(self, tmp_path):
        """`datasets` itself would read the files of the folder that the pattern matches."""
        for name in ("set1", "set[1]"):
            write(tmp_path / "repository", [name])
            (tmp_path / "repository").rename(tmp_path / name)
        assert answers_in(tmp_path / "set1") == ["set1"]
        with pytest.raises(ConfigError, match="would be taken for a pattern; rename it"):
            find(parse_source(f"records:{tmp_path}/set[1]"))


@pytest.mark.parametrize("name", ["csv", "json", "parquet", "text", "pandas", "imagefolder"])
def test_a_kind_of_file_is_no_data_set(tmp_path, name, monkeypatch):
    """`datasets` takes such a name for one of its readers, and reads what it finds in the current folder."""
    write(tmp_path / "a.csv", ["x"] * 9)
    (tmp_path / "a.jsonl.gz").write_bytes(b"nonsense")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{name} is a kind of file, not a data set; name the file"):
        find(parse_source(name))


@pytest.mark.parametrize("is_repository", [False, True])
def test_a_folder_of_that_name_is_one(tmp_path, monkeypatch, is_repository):
    if is_repository:
        write(tmp_path / "repository", ["x"])
        (tmp_path / "repository").rename(tmp_path / "csv")
    else:
        (tmp_path / "csv").mkdir()
        write(tmp_path / "csv" / "a.csv", ["x"])
    monkeypatch.chdir(tmp_path)
    assert answers_in("csv") == ["x"]


def test_lines_of_text_in_a_repository_are_what_the_file_holds_now(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: rows.txt\n---\n")
    for word in ("old", "new"):
        (tmp_path / "rows.txt").write_text(f"{word}\n" * 3)
        os.utime(tmp_path / "rows.txt", (1, 1))
        (part,) = find(parse_source(f"passkey:{tmp_path}")).parts
        assert part[0].column("text") == [word] * 3


@pytest.mark.parametrize("builder", ["arrow", "text"])
def test_other_files_of_a_repository_are_refused_in_one_line_where_they_are_damaged(tmp_path, builder):
    (tmp_path / f"rows.{'txt' if builder == 'text' else 'arrow'}").write_bytes(b"caf\xe9")
    ending = "txt" if builder == "text" else "arrow"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: rows.{ending}\n---\n")
    with pytest.raises(ConfigError, match="can't be read: ") as caught:
        find(parse_source(f"records:{tmp_path}"))
    assert "\n" not in str(caught.value)


class TestSplits:
    def test_of_a_folder_stand_in_its_names(self, tmp_path):
        for name in ("train-00000-of-00001", "my_test", "dev"):
            write(tmp_path / f"{name}.jsonl", [name])
        (tmp_path / "README.md").write_text("# Mine\n")
        for split, name in {"train": "train-00000-of-00001", "test": "my_test", "validation": "dev"}.items():
            assert answers_in(f"{tmp_path}?split={split}") == [name]
        assert [part[0].column("answer") for part in find(parse_source(f"records:{tmp_path}?split=train+test")).parts]
        with pytest.raises(ConfigError, match='Unknown split "tset"'):
            find(parse_source(f"records:{tmp_path}?split=tset"))

    def test_can_be_cut(self, tmp_path):
        write(tmp_path / "a.csv", list(map(str, range(10))))
        assert answers_in(f"{tmp_path}/a.csv?split=train[2:5]") == ["2", "3", "4"]
        assert answers_in(f"{tmp_path}/a.csv?split=train[-10%:]") == ["9"]

    def test_go_over_files(self, tmp_path):
        for name, values in {"a": "012", "b": "345"}.items():
            write(tmp_path / f"{name}.csv", list(values))
        parts = find(parse_source(f"records:{tmp_path}/*.csv?split=train[1:5]")).parts
        assert [list(rows.column("answer"))[start:stop] for rows, start, stop in parts] == [["1", "2"], ["3", "4"]]

    def test_of_a_saved_data_set(self, tmp_path):
        rows = datasets.Dataset.from_list([{"context": "c", "question": "q", "answer": str(n)} for n in range(4)])
        datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(str(tmp_path / "both"))
        assert answers_in(f"{tmp_path}/both?split=test") == ["3"]
        rows.save_to_disk(str(tmp_path / "one"))
        assert answers_in(f"{tmp_path}/one?split=train[:2]") == ["0", "1"]
        with pytest.raises(ConfigError, match='Unknown split "test"'):
            find(parse_source(f"records:{tmp_path}/one?split=test"))


HEADER = "context,question,answer\n"
GOOD = '{"context": "c", "question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", HEADER + "c,q,a\nc,q\n", r"a\.csv, line 3: 2 cells under a header of 3"),
        ("a.csv", HEADER + 'c,q,"two\nlines"\nc,q,a,more\n', r"a\.csv, line 4: 4 cells under a header of 3"),
        ("a.csv", HEADER + 'c,q,a\nc,q,"open\n', r"a\.csv, line 3: unexpected end of data"),
        ("a.tsv", HEADER.replace(",", "\t") + 'c\tq\t"5" disk\n', r"a\.tsv, line 2: .* expected after"),
        ("a.csv", "answer,context,question,answer\nc,q,a,b\n", "two columns are called 'answer'"),
        ("a.csv", HEADER.encode() + b"c,q,caf\xe9\n", r"a\.csv, line 2: byte 0xe9 is not UTF-8; save it as UTF-8"),
        ("a.csv", (HEADER + "c,q,a\n").encode("utf-16"), r"a\.csv is UTF-16; save it as UTF-8"),
        ("a.csv", HEADER + "c,q,a\0b\n", r"a\.csv, line 2: holds a NUL character"),
        ("a.jsonl", GOOD.encode("utf-16-le"), r"a\.jsonl, line 1: holds a NUL character"),
        ("a.jsonl", GOOD.encode("utf-32"), r"a\.jsonl is UTF-32; save it as UTF-8"),
        ("a.jsonl", GOOD.encode() + GOOD.replace("a", "ä").encode("latin-1"), r"a\.jsonl, line 2: byte 0xe4"),
        ("a.jsonl", GOOD + GOOD[:-2] + ', "answer": "b"}', "line 2: key 'answer' stands twice in one object"),
        ("a.json", f"[{GOOD}, {GOOD[:-3]}]", r"a\.json, line 2: is not JSON"),
        ("a.json", f'[{GOOD}, {{"x": {{"k": 1, "k": 2}}}}]', "key 'k' stands twice in one object"),
        ("a.jsonl", GOOD + "\n7\n", r"a\.jsonl, line 3: is no JSON object"),
        ("a.json", f"[{GOOD}, null]", r"a\.json, row 2: is no JSON object"),
        ("a.json", '{\n "context": "c"\n}', r"a\.json, line 1: is not a JSON value on one line"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
        ("a.txt", "fine\nca\u00e9".encode("latin-1"), r"a\.txt, line 2: byte 0xe9 is not UTF-8"),
        ("a.txt", "fine".encode("utf-16"), r"a\.txt is UTF-16"),
        ("a.parquet", "nonsense", r"a\.parquet: Parquet magic bytes"),
        ("a.jsonl.gz", "nonsense", r"a\.jsonl\.gz: can't be read after line 0 \(Not a gzipped file"),
        ("a.jsonl.gz", COMPRESS[".gz"](GOOD.encode() * 9000)[:-50], r"a\.jsonl\.gz: can't be read after line \d+"),
        ("a.jsonl.zst", "nonsense", r"a\.jsonl\.zst: can't be read after line 0 \(ZSTD"),
        ("a.jsonl.gz", COMPRESS[".gz"](GOOD.encode("utf-16")), r"a\.jsonl\.gz is UTF-16; save it as UTF-8"),
        ("a.jsonl.gz", COMPRESS[".gz"](GOOD.encode() + b"{"), r"a\.jsonl\.gz, line 2: is not a JSON value"),
        ("a.parquet.gz", "nonsense", r"a\.parquet\.gz: Parquet magic bytes"),
        ("a.gz", "nonsense", r"a file without ending is not one of .*\.gz or \.zst"),
        ("a.pkl", "nonsense", r"\.pkl is not one of \.jsonl"),
    ],
)  # fmt: skip
def test_what_is_not_certain_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        find(parse_source(f"records:{tmp_path}/{name}"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"source 'records:{tmp_path}/{name}' can't be read")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("NaN", "line 2: column 'answer' holds nan as a number"),
        ("-Infinity", "line 2: column 'answer' holds -inf as a number"),
        ('"\\ud800"', "line 2: column 'answer' holds half a surrogate pair"),
        ('{"a": 1}', "line 2: column 'answer' holds dict values, not text"),
        ('[["x"], {"a": 1}]', "line 2: column 'answer' holds dict values, not text"),
    ],
)
def test_cells_without_a_text_are_refused_with_their_row_where_they_are_used(tmp_path, answer, message):
    row = f'{{"context": "c", "question": "q", "answer": {answer}, "other": {answer}}}'
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + row)
    with pytest.raises(ConfigError, match=message):
        load_records(parse_source(f"records:{path}"), "calibration", answers=True)
    path.write_text("".join(GOOD.replace('"c"', f'"c{n}"').replace("}", f', "other": {answer}}}') for n in range(9)))
    assert load_records(parse_source(f"records:{path}"), "calibration", answers=True)


@pytest.mark.parametrize("kind", ["timestamp", "binary", "float"])
def test_parquet_cells_without_a_text_are_refused_with_their_row(tmp_path, kind):
    import datetime

    cells = {"timestamp": datetime.datetime(2024, 1, 31), "binary": b"x", "float": float("nan")}
    rows = pa.table({"context": ["c", "d"], "question": ["q", "q"], "answer": [None, cells[kind]]})
    pq.write_table(rows, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet, row 2: column 'answer' holds"):
        load_records(parse_source(f"records:{tmp_path}/a.parquet"), "calibration", answers=True)
