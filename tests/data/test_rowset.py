"""The rows of a source come out of the cache as they went in, and are tokenised as in memory."""

import dataclasses
import json

import pytest

from matrix_llm.data.forms import Row
from matrix_llm.data.readers import Source
from matrix_llm.data.rowset import SCHEMA, RowSet
from matrix_llm.data.tokens import Encoder

OBJECTS = {
    "chat": {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]},
    "verbatim": {"prompt": "1 + 1 =", "completion": " 2"},
    "template": {"question": "1 + 1?", "answer": "#### 2"},
    "text": {"text": "Two is even."},
}


@pytest.fixture
def write(tmp_path):
    def write(objects):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects))
        return Source(str(tmp_path / "rows.jsonl"))

    return write


def test_every_field_of_a_row_has_a_column():
    assert SCHEMA.names == [field.name for field in dataclasses.fields(Row)]


@pytest.mark.parametrize("layout", OBJECTS)
def test_rows_come_out_as_they_went_in(write, tmp_path, layout):
    source = write([OBJECTS[layout]] * 3)
    expected = list(source.rows())
    assert {row.layout for row in expected} == {layout}
    for root, streaming in ((tmp_path, False), (None, False), (None, True)):
        found = RowSet(source, root, streaming=streaming)
        assert found.layout == layout
        assert list(found) == list(found) == expected


def test_the_file_is_read_once_and_then_found(write, tmp_path, monkeypatch):
    source = write([OBJECTS["text"]] * 3)
    expected = list(RowSet(source, tmp_path))
    monkeypatch.setattr(Source, "read", None)  # another run must not call it
    assert list(RowSet(source, tmp_path)) == expected


def test_tokens_in_the_cache_in_memory_and_of_two_processes_are_the_same(write, tmp_path, tiny_tokenizer):
    source = write([{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(50)])
    encoder = Encoder(tiny_tokenizer, "verbatim", max_length=12)
    expected = encoder.encode(list(source.rows()), list(range(50)))
    ways = [(None, None), (tmp_path / "one", None), (tmp_path / "two", 2)]
    for root, num_proc in ways:
        if root:
            root.mkdir()
        assert RowSet(source, root).tokens(encoder, "train", num_proc=num_proc).to_dict() == expected


def test_the_first_rows_alone_are_tokenised_alone(write, tmp_path, tiny_tokenizer):
    source = write([{"text": f"{i} pens"} for i in range(9)])
    encoder = Encoder(tiny_tokenizer, "text")
    for root in (None, tmp_path):
        found = RowSet(source, root)
        whole = found.tokens(encoder, "train").to_list()
        assert found.tokens(encoder, "train", count=4).to_list() == whole[:4]
        assert found.tokens(encoder, "train", count=99).to_list() == whole
