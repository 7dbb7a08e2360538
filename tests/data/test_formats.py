"""Each format of file gives the same rows; what is cut off, misnamed or malformed is one line with its place."""

import csv
import gzip
import io
import json
import tracemalloc

import datasets
import pyarrow as pa
import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data import formats
from matrix_llm.data.readers import Source

OBJECTS = [{"query": f'{i} + 1, "or" so?\nYes', "response": f"é {i}"} for i in range(5)]


def found(path, **options):
    return [each for _, each in Source(str(path), **options).read()]


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as error:
        found(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def as_csv(delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["query", "response"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(OBJECTS)
    return text.getvalue()


LINES = "".join(json.dumps(each) + "\n" for each in OBJECTS)
WAYS = {
    "lines.json": LINES,
    "pretty.json": json.dumps(OBJECTS, indent=1),
    "inside.json": json.dumps({"version": 1.5, "tags": ["a"], "data": OBJECTS, "of": {"x": [1]}}, indent=2),
    "one line.json": json.dumps({"rows": OBJECTS}),
    "splits.json": json.dumps({"test": OBJECTS[:1], "train": OBJECTS}),
    "a.csv": "\ufeff" + as_csv(),
    "a.tsv": as_csv("\t"),
    "A.JSONL": LINES,
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_every_format_gives_the_same_rows(tmp_path, name, packed):
    path, content = tmp_path / (name + packed), WAYS[name].encode()
    if packed == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if packed else content)
    rows = found(path)
    assert [{key: value.replace("\r\n", "\n") for key, value in row.items()} for row in rows] == OBJECTS


def test_a_row_that_holds_a_list_is_a_row_and_not_a_list_of_rows(tmp_path):
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "tools": [{}]}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1))
    assert found(tmp_path / "a.json") == [row]
    (tmp_path / "b.json").write_text(json.dumps(OBJECTS[0], indent=1))  # MATH has one file for each problem
    assert found(tmp_path / "b.json") == OBJECTS[:1]


def test_save_to_disk_folders_are_read_by_split(tmp_path):
    rows = datasets.Dataset.from_list(OBJECTS)
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(train=rows, validation=rows.select([0])).save_to_disk(str(tmp_path / "two"))
    assert found(tmp_path / "one") == found(tmp_path / "two") == OBJECTS
    assert found(tmp_path / "two", split="validation") == found(tmp_path / "two", split="dev") == OBJECTS[:1]
    assert found(tmp_path / "one", split="train[1:3]") == OBJECTS[1:3]
    assert "train, validation" in refusal(tmp_path / "two", split="test")
    before = Source(str(tmp_path / "one")).identity()
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"what a later map() wrote")
    (tmp_path / "one" / "folder").mkdir()
    assert Source(str(tmp_path / "one")).identity() == before
    rows.select(range(4)).save_to_disk(str(tmp_path / "one"))
    assert Source(str(tmp_path / "one")).identity() != before
    (tmp_path / "two" / "train" / "state.json").unlink()
    assert "incomplete" in refusal(tmp_path / "two")


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "array.json.gz", "inside.json", "rows.csv.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(formats, "ARRAY_CHUNK", 1 << 14)
    peaks = []
    for count in (1000, 4000):
        rows = [{"query": f"{i}?", "response": "x" * 500} for i in range(count)]
        text = {
            "rows.jsonl.gz": lambda rows=rows: "".join(json.dumps(row) + "\n" for row in rows),
            "array.json.gz": lambda rows=rows: json.dumps(rows),
            "inside.json": lambda rows=rows: json.dumps({"data": rows}),
            "rows.csv.gz": lambda rows=rows: (
                "query,response\n" + "".join(f"{i}?,{'x' * 500}\n" for i in range(len(rows)))
            ),
        }[name]().encode()
        path = tmp_path / f"{count}{name}"
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        del text
        tracemalloc.start()
        assert sum(1 for _ in Source(str(path)).read()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


BAD = {
    # cut off, or not what the name says
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-9], "cut.jsonl.gz: cannot be read: .*ended before"),
    "not.jsonl.gz": (b"{}", "not.jsonl.gz: cannot be read: Not a gzipped file"),
    "packed.jsonl": (gzip.compress(b"{}"), "compressed by gzip.*Rename it to end in .gz"),
    "zip.json": (b"PK\x03\x04xx", "zip archive.*Unpack"),
    "utf16.csv": ("a,b\n1,2\n".encode("utf-16"), "UTF-16.*UTF-8"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "array.jsonl": (json.dumps(OBJECTS), "line 1: a JSON array.*Rename the file to .json"),
    "pretty array.jsonl": (json.dumps(OBJECTS, indent=1), "line 1: .*JSON array.*Rename it to .json"),
    "pretty.jsonl": (
        json.dumps(OBJECTS[0], indent=1),
        "line 1: an object that goes on over several lines.*one per line",
    ),
    # JSON
    "two.json": (json.dumps(OBJECTS) * 2, "two.json line 1: .*expected the end of the file"),
    "comma.json": ('[{"a": 1} {"a": 2}]', "comma.json line 1: .*expected , or ]"),
    "cut.json": (json.dumps({"data": OBJECTS}, indent=1)[:-9], "cut.json line 2[0-9]: not JSON"),
    "lists.json": (json.dumps({"a": OBJECTS, "b": OBJECTS}), "several lists of rows: a, b.*file for each"),
    "deep.jsonl": ("[" * 100_000, "line 1: .*nested too deeply"),
    "deep.json": ("[" * 100_000, "line 1: .*nested too deeply"),
    "digits.jsonl": ('{"a": ' + "9" * 5000 + "}", "line 1: .*too many digits"),
    # CSV
    "short.csv": ("query,response\na,b\nc\n", "short.csv line 3: 1 cells.*2 columns"),
    "long.csv": ('query,response\n"a\nb",c\nd,e,f\n', "long.csv line 4: 3 cells.*double quotes"),
    "open.csv": ('query,response\n"a,b\n', "open.csv line 2: .*unexpected end of data"),
    "quote.csv": ('query,response\na,b\n"c"d,e\n', "quote.csv line 3: not .csv"),
    "twice.csv": ("a,a\n1,2\n", "line 1: the header names 'a' twice"),
    "semicolon.csv": ("query;response\na;b\n", "line 1: the header is one column.*';'"),
    "latin1.csv": (b"query,response\na,\xe9\n", "latin1.csv line 2: not UTF-8"),
    # formats that are not read
    "a.arrow": (b"x", "a.arrow: rows are read from .*save_to_disk"),
    "a.txt": (b"x", "a.txt: .*\\.jsonl"),
    "a.xlsx": (b"x", "a.xlsx: .*Save it as .csv"),
    "a.jsonl.zip": (b"x", "a.jsonl.zip: .*Unpack it"),
    "a.jsonl.bz2": (b"x", "a.jsonl.bz2: .*gz"),
    "a.foo": (b"x", "a.foo: .*Convert or rename it"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_one_line_with_its_place_and_the_way_out(tmp_path, name):
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=said) as error:
        found(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_slip_at_the_start_of_a_large_array_is_found_without_reading_it_all(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "ARRAY_CHUNK", 1000)
    (tmp_path / "a.json").write_text('[{"a": tru}, ' + json.dumps(["x" * 100] * 10_000)[1:])
    tracemalloc.start()
    assert "line 1: not JSON" in refusal(tmp_path / "a.json")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000
