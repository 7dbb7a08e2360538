"""Rows that cannot be trained on are dropped, cut or refused, as the recipe says, and counted."""

import datasets
import numpy as np
import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data.forms import Row
from matrix_llm.data.selection import drop_unusable
from matrix_llm.data.tokens import IGNORED, Encoder

ROWS = [Row("verbatim", *texts) for texts in (("1", " 2"), ("1", " 2" * 50), ("1" * 50, " 2"), ("3", " 4"))]


def select(tokenizer, rows=ROWS, leaked=(), **options):
    encoder = Encoder(tokenizer, "verbatim", **options)
    tokens = datasets.Dataset.from_dict(encoder.encode(rows, range(len(rows))))
    return drop_unusable(tokens, encoder, "train", leaked)


def test_long_rows_are_dropped_and_counted(tiny_tokenizer):
    dataset, report = select(tiny_tokenizer, max_length=10)
    assert dataset.column_names == ["input_ids", "labels", "row_id"]
    assert dataset["row_id"][:] == [0, 3]
    assert (report.rows_in, report.rows_kept, report.dropped_too_long, report.truncated) == (4, 2, 2, 0)
    assert report.longest > 50
    assert report.tokens == sum(map(len, dataset["input_ids"]))
    assert report.trained_tokens == sum(label != IGNORED for labels in dataset["labels"] for label in labels)


def test_rows_of_weight_0_and_tokens_that_were_there_twice_are_counted(tiny_tokenizer):
    rows = [
        Row("verbatim", "1", " 2", weight=0),
        ROWS[0],
        Row("verbatim", "<s>1", " 2"),
        Row("verbatim", "1", " 2</s>"),
    ]
    dataset, report = select(tiny_tokenizer, rows, max_length=10, too_long="error")
    assert dataset["row_id"][:] == [1, 2, 3]
    assert (report.dropped_weight_zero, report.dropped_all_masked) == (1, 0)
    assert (report.had_start, report.had_end) == (1, 1)
    assert report.mean_read == report.mean_length  # a row that is left out has no length
    said = "\n".join(report.lines())
    assert "1 rows dropped, weight 0 (25.00 %)" in said
    assert "1 rows began with" in said
    assert "1 rows ended in" in said
    with pytest.raises(DataError, match=r"all 1 rows have the weight 0.*Remove their weights"):
        select(tiny_tokenizer, [rows[0]])
    with pytest.raises(DataError, match="weight 0"):
        select(tiny_tokenizer, [rows[0], ROWS[1]], max_length=10, too_long="truncate", leaked=[1])


def test_long_rows_are_cut_and_dropped_where_only_the_prompt_is_left(tiny_tokenizer):
    dataset, report = select(tiny_tokenizer, max_length=10, too_long="truncate")
    assert dataset["row_id"][:] == [0, 1, 3]
    assert (report.truncated, report.dropped_all_masked, report.dropped_too_long) == (1, 1, 0)
    assert max(map(len, dataset["input_ids"])) == 10
    assert any("1 rows cut to max_length" in line for line in report.lines())


def test_long_rows_are_refused_and_the_first_is_named(tiny_tokenizer):
    with pytest.raises(DataError, match=r"train: row 2 .*max_length=10.* 2 rows.*Raise max_length.*too_long"):
        select(tiny_tokenizer, max_length=10, too_long="error")


def test_a_leaked_row_counts_as_leaked_and_as_nothing_else(tiny_tokenizer):
    dataset, report = select(tiny_tokenizer, max_length=10, leaked=[0, 1])
    assert dataset["row_id"][:] == [3]
    assert (report.dropped_leaked, report.dropped_too_long, report.dropped_all_masked) == (2, 1, 0)


def test_no_row_left_names_the_longest(tiny_tokenizer):
    with pytest.raises(
        DataError, match=r"all 1 rows are longer than max_length.*54 tokens, max_length=4.*Raise max_length"
    ):
        select(tiny_tokenizer, ROWS[2:3], max_length=4)


def test_length_statistics_are_numpys_of_the_rows_before_any_cut(tiny_tokenizer):
    rows = [Row("verbatim", "1" * (i % 37), " 2" * (i % 11)) for i in range(200)]
    whole, report = select(tiny_tokenizer, rows)
    dataset, cut = select(tiny_tokenizer, rows, max_length=report.p50)
    lengths = [len(ids) for ids in whole["input_ids"]]
    assert len(whole) == 200
    assert report.mean_read == pytest.approx(np.mean(lengths))
    assert [report.p50, report.p90, report.p99] == [sorted(lengths)[i] for i in (99, 179, 197)]
    assert (cut.longest, cut.p99) == (report.longest, report.p99)
    over = sum(length > report.p50 for length in lengths)
    assert 0 < over == cut.dropped_too_long == 200 - len(dataset)
    assert f"{over} rows dropped, longer than max_length ({over / 2:.2f} %)" in cut.lines()[2]
