"""Files, folders, Hub ids and the generator give the same rows; a bad file or row is named with its place."""

import json
import os
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data import formats
from matrix_llm.data.forms import Row
from matrix_llm.data.readers import Source
from matrix_llm.data.wordproblems import generate

OBJECTS = [{"query": f"{i} + 1?", "response": f"The answer is: {i + 1}", "type": "x"} for i in range(5)]
ROWS = [Row("template", each["query"], each["response"]) for each in OBJECTS]


def jsonl(path, lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return str(path)


def read(source, **options):
    return list(Source(str(source), **options).rows())


def refusal(source, **options) -> str:
    with pytest.raises(DataError) as error:
        read(source, **options)
    return str(error.value)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_jsonl_json_parquet_and_a_folder_give_the_same_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(OBJECTS, indent=1))
    pq.write_table(pa.Table.from_pylist(OBJECTS), tmp_path / "a.parquet")
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder/train-0.jsonl", OBJECTS[:2])
    jsonl(tmp_path / "folder/train-1.jsonl", OBJECTS[2:])
    jsonl(tmp_path / "folder/test.jsonl", OBJECTS[:1])
    (tmp_path / "folder/.hidden").mkdir()  # such as a version control's
    jsonl(tmp_path / "folder/.hidden/train-2.jsonl", OBJECTS)
    jsonl(tmp_path / "a.jsonl", OBJECTS)
    for name in ("a.jsonl", "a.json", "a.parquet", "folder"):
        assert read(tmp_path / name) == ROWS, name
    assert read(tmp_path / "folder", split="test") == ROWS[:1]
    assert read(tmp_path / "a.jsonl", max_rows=3) == ROWS[:3]


def test_a_folder_without_the_split_does_not_give_another(tmp_path):
    jsonl(tmp_path / "train.jsonl", OBJECTS)
    message = refusal(tmp_path, split="test")
    assert "files for train" in message
    assert "'test'" in message


def test_builtin_rows_differ_between_splits_and_repeat_with_the_seed():
    train, test = read("builtin", builtin_rows=20, seed=1), read("builtin", builtin_rows=20, seed=1, split="test")
    assert len(train) == len(test) == 20
    assert train == read("builtin", builtin_rows=20, seed=1) != read("builtin", builtin_rows=20, seed=2)
    assert not {row.question for row in train} & {row.question for row in test}
    assert read("builtin", max_rows=5, seed=1) == train[:5]
    unseen = [problem.query for problem in generate(20, seed=1, split="new_kinds")]
    assert [row.question for row in read("builtin", builtin_rows=20, seed=1, split="new_kinds")] == unseen


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_whole_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(formats, "ARRAY_CHUNK", chunk)
    made = [{"query": f'say "{i}], [" \u00e9 {{', "response": "[1]"} for i in range(20)]
    (tmp_path / "a.json").write_text(" \n" + json.dumps(made, indent=indent) + "\n", encoding="utf-8-sig")
    assert [found for _, found in Source(str(tmp_path / "a.json")).read()] == made
    text = json.dumps(made, indent=1)
    (tmp_path / "b.json").write_text(text.replace('"response": "[1]"\n }\n]', '"response": \n }\n]'))
    assert f"b.json line {text.count(chr(10))}: not JSON" in refusal(tmp_path / "b.json")


def test_memory_does_not_grow_with_a_json_array(tmp_path, monkeypatch):
    """MetaMathQA is one array of 400 MB, which as Python objects takes 2 GB."""
    monkeypatch.setattr(formats, "ARRAY_CHUNK", 1 << 14)
    peaks = []
    for count in (1000, 4000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps([{"query": f"{i}?", "response": "x" * 500} for i in range(count)]))
        tracemalloc.start()
        assert sum(1 for _ in Source(str(path)).rows()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("third", "said"),
    [
        ('{"query": "1", "response": ', "not JSON"),
        ("[1, 2]", "expected an object"),
        ({"query": "1 + 1?"}, "no `response`"),
        ('{"query": "\\ud83d", "response": "b"}', "half of a surrogate pair"),
    ],
    ids=str,
)
def test_a_bad_line_3_is_named_with_file_and_line(tmp_path, third, said):
    message = refusal(jsonl(tmp_path / "bad.jsonl", [*OBJECTS[:2], third, *OBJECTS[2:]]))
    assert message.startswith(f"{tmp_path}/bad.jsonl line 3: ")
    assert said in message


def test_blank_lines_keep_the_line_numbers_true(tmp_path):
    assert "line 4: no `response`" in refusal(jsonl(tmp_path / "bad.jsonl", [*OBJECTS[:1], "", "", {"query": "1"}]))


def test_the_first_row_decides_the_form_of_all(tmp_path):
    message = refusal(jsonl(tmp_path / "mixed.jsonl", [*OBJECTS[:1], {"text": "Two is even."}]))
    assert "line 2: no `query`" in message


def test_broken_files_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    assert "bad.parquet: not a readable Parquet file" in refusal(tmp_path / "bad.parquet")
    (tmp_path / "bad.jsonl").write_bytes(b'{"query": "\xff"}\n')
    assert "bad.jsonl line 1: not UTF-8" in refusal(tmp_path / "bad.jsonl")
    pq.write_table(pa.Table.from_pylist([OBJECTS[0], {"query": "1", "response": None}]), tmp_path / "null.parquet")
    assert "null.parquet row 2: `response` is null" in refusal(tmp_path / "null.parquet")


def test_empty_and_missing_data_are_refused(tmp_path):
    assert "holds no rows" in refusal(jsonl(tmp_path / "empty.jsonl", []))
    assert "nothing at" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "folder").mkdir()
    assert "holds no .jsonl, .json" in refusal(tmp_path / "folder")
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    assert "rows.xlsx: rows are read from" in refusal(tmp_path / "rows.xlsx")


def test_a_hub_id_that_cannot_be_reached_is_one_line_with_the_way_out():
    with pytest.raises(DataError, match=r"'nobody/nothing', split 'dev'.*give a local file") as error:
        read("nobody/nothing", split="dev")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_asked_for_its_configuration_revision_and_slice(monkeypatch, streaming):
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *words, **options: asked.append((words, options)) or iter(OBJECTS)
    )
    source = Source("org/rows", "main", split="train[1:3]", revision="v1")
    found = [row for _, row in source.read(streaming=streaming)]
    # `datasets` cuts the slice itself, but not that of a stream
    split = "train" if streaming else "train[1:3]"
    assert asked == [(("org/rows", "main"), {"split": split, "revision": "v1", "streaming": streaming})]
    assert found == (OBJECTS[1:3] if streaming else OBJECTS)


# --- columns and slices -----------------------------------------------------------------------------------------------


def test_columns_give_the_rows_our_names_and_hide_theirs(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl", [{"q": f"{i}?", "a": f"#### {i}", "query": "not this", "x": 1} for i in range(3)]
    )
    source = Source(path, columns={"question": "q", "answer": "a"})
    assert next(found for _, found in source.read()) == {
        "question": "0?",
        "answer": "#### 0",
        "query": "not this",
        "x": 1,
    }
    assert [(row.question, row.answer) for row in source.rows()][1] == ("1?", "The answer is: 1")
    swapped = Source(path, columns={"query": "x", "x": "query"})
    assert next(swapped.read())[1] == {"query": 1, "x": "not this", "q": "0?", "a": "#### 0"}
    assert len({Source(path).identity(), source.identity(), swapped.identity()}) == 3


def test_a_column_that_the_rows_do_not_have_is_refused_with_the_nearest(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", OBJECTS)
    message = refusal(path, columns={"question": "qurey", "answer": "response"})
    assert message.startswith(f"{path} line 1: columns says question: qurey")
    assert message.endswith("Did you mean query?")


@pytest.mark.parametrize(
    ("split", "places"),
    [
        ("train[:2]", [0, 1]), ("train[3:]", [3, 4]), ("train[1:3]", [1, 2]), ("train[:40%]", [0, 1]),
        ("train[80%:]", [4]), ("train[-2:]", [3, 4]), ("train[:-4]", [0]), ("train[20%:-20%]", [1, 2, 3]),
        ("train[:99]", [0, 1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_a_slice_of_a_split_is_that_of_the_hub(tmp_path, split, places):
    path = jsonl(tmp_path / "a.jsonl", OBJECTS)
    assert read(path, split=split) == [ROWS[place] for place in places]
    assert Source(path, split=split).identity() != Source(path).identity()


def test_a_slice_keeps_line_numbers_true_and_an_empty_one_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*OBJECTS[:4], {"query": "1"}])
    assert "line 5: no `response`" in refusal(path, split="train[3:]")
    assert "(split train[9:]) holds no rows" in refusal(path, split="train[9:]")
    for wrong in ("train+test", "train[:x]", "train[:200%]", "train[1:2:3]", "train["):
        assert "split" in refusal(path, split=wrong)


def test_builtin_rows_can_be_sliced(tmp_path):
    assert read("builtin", split="train[5:7]", builtin_rows=10) == read("builtin", builtin_rows=10)[5:7]


# --- what rows are known by -------------------------------------------------------------------------------------------


def test_rows_are_known_by_their_content_and_what_narrows_it(tmp_path):
    path = tmp_path / "a.jsonl"
    first = Source(jsonl(path, OBJECTS)).identity()
    os.utime(path, (0, 0))  # the content counts, not the date
    assert Source(str(path)).identity() == first
    moved = path.rename(tmp_path / "b.jsonl")
    assert Source(str(moved)).identity() == first
    others = [Source(str(moved), max_rows=3).identity(), Source(jsonl(path, OBJECTS[:4])).identity()]
    builtin = [Source("builtin", builtin_rows=n, seed=s).identity() for n, s in ((5, 0), (6, 0), (5, 1))]
    assert len({first, *others, *builtin}) == 6
