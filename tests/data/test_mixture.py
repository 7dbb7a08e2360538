"""Several data sets become one: rows as often as the weights say, each with an id of its own, none lost in silence."""

import itertools
import json
from collections import Counter

import pytest

from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.config import load_recipe
from matrix_llm.data.mixture import draw
from matrix_llm.data.readers import Source
from matrix_llm.data.rowset import RowSet
from matrix_llm.data.streaming import StreamedSet, TokenStream
from matrix_llm.data.tokens import Encoder
from matrix_llm.run.prepare import prepare_data


def quiet(_):
    pass


@pytest.fixture
def three(tmp_path):
    """40 rows of query and response, 20 of a CSV with other names, 10 texts."""
    rows = [{"query": f"{i} + 1?", "response": f"a {i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text("problem,note\n" + "".join(f"{i} * 2?,b {i}\n" for i in range(20)))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": f"c {i}"}) + "\n" for i in range(10)))
    return [
        str(tmp_path / "a.jsonl"),
        {"path": str(tmp_path / "b.csv"), "weight": 0.5, "columns": {"query": "problem", "response": "note"}},
        {"path": str(tmp_path / "c.jsonl"), "weight": 2.5},
    ]


def texts(prepared):
    return [prepared.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in prepared.train]


def test_an_epoch_holds_each_set_as_often_as_its_weight_says(recipe, three):
    prepared = prepare_data(recipe(dataset=three), say=quiet)
    found = texts(prepared)
    assert len(found) == prepared.report.rows_kept == 40 + 10 + 25
    once = Counter(found)
    assert sorted(count for text, count in once.items() if text.startswith("Question") and "+" in text) == [1] * 40
    assert sorted(count for text, count in once.items() if "*" in text) == [1] * 10
    assert sorted(count for text, count in once.items() if text.startswith("c ")) == [2] * 5 + [3] * 5
    ids = {row["row_id"]: text for row, text in zip(prepared.train, found, strict=True)}
    assert len(ids) == len(once) == 60  # a row has one id, however often it is taken
    assert ids[39] == "Question: 39 + 1?\nAnswer: a 39"
    assert ids[69] == "c 9"
    assert prepared.report.tokens == sum(len(row["input_ids"]) for row in prepared.train)
    assert prepared.report.trained_tokens == sum(
        sum(label != -100 for label in row["labels"][1:]) for row in prepared.train
    )


def test_the_report_counts_each_set(recipe, three):
    report = prepare_data(recipe(dataset=three), say=quiet).report
    assert [(part.rows_in, part.rows_taken, part.weight) for part in report.parts] == [
        (40, 40, 1),
        (20, 10, 0.5),
        (10, 25, 2.5),
    ]
    lines = "\n".join(report.lines())
    for name, taken in (("a.jsonl", "weight 1: 40"), ("b.csv", "weight 0.5: 10"), ("c.jsonl", "weight 2.5: 25")):
        assert f"{name}: {taken} rows taken" in lines
    assert "75 rows in an epoch, of 70 read from 3 data sets" in lines


def test_the_seed_decides_which_rows_are_drawn_and_the_cache_changes_nothing(recipe, three):
    first = prepare_data(recipe(dataset=three), say=quiet).train.to_list()
    assert prepare_data(recipe(dataset=three), say=quiet).train.to_list() == first
    assert prepare_data(recipe(dataset=three, data_seed=7), say=quiet).train.to_list() != first


def test_one_data_set_is_prepared_as_if_it_were_not_in_a_list(recipe, rows):
    alone, listed = (prepare_data(recipe(dataset=each), say=quiet) for each in (rows(), [rows()]))
    assert listed.train.to_list() == alone.train.to_list()
    assert listed.report == alone.report


@pytest.mark.parametrize(("count", "weight"), [(7, 0.5), (7, 1), (7, 3), (7, 2.4), (1, 0.6)])
def test_a_draw_is_as_even_as_it_can_be(count, weight):
    taken = Counter(draw(count, weight, "seed"))
    assert taken.total() == round(weight * count)
    assert max(taken.values()) - min((taken[place] for place in range(count)), default=0) <= 1


def test_a_leaked_row_of_the_second_set_is_dropped_from_it(recipe, three, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "3 * 2?"}) + "\n")
    settings = {"dataset": [three[0], {**three[1], "weight": 1}], "leakage_check": [str(tmp_path / "test.jsonl")]}
    for streaming in (False, True):
        prepared = prepare_data(recipe(**settings, leakage="drop", streaming=streaming), say=quiet)
        found = {row["row_id"]: row for row in itertools.islice(prepared.train, 59)}
        decoded = [prepared.tokenizer.decode(row["input_ids"]) for row in found.values()]
        assert len(found) == 59
        assert not any("3 * 2?" in text and "13 * 2?" not in text for text in decoded), streaming


def test_an_error_in_the_second_set_names_its_file_and_line(recipe, rows, tmp_path):
    (tmp_path / "bad.csv").write_text("query,response\na,b\nc,\n")
    with pytest.raises(DataError, match=r"bad\.csv line 3: `response` is empty"):
        prepare_data(recipe(dataset=[rows(), str(tmp_path / "bad.csv")]), say=quiet)


def test_a_weight_that_leaves_no_row_is_refused(recipe, rows, three):
    with pytest.raises(DataError, match=r"c\.jsonl: weight=0\.01 of 10 rows.*Raise the weight"):
        prepare_data(recipe(dataset=[rows(), {**three[2], "weight": 0.01}]), say=quiet)


# --- streams ----------------------------------------------------------------------------------------------------------


def streamed(three, tokenizer, buffer):
    sources = [
        Source(three[0]),
        Source(three[1]["path"], columns=three[1]["columns"]),
        Source(three[2]["path"]),
    ]
    weights = (1, 0.5, 2.5)
    sets = [
        StreamedSet(source, Encoder(tokenizer, RowSet(source, None).layout, prompt_template="plain"), weight)
        for source, weight in zip(sources, weights, strict=True)
    ]
    return TokenStream(sets, seed=0, buffer=buffer)


def test_a_stream_mixes_the_sets_by_their_weights_in_an_order_of_the_seed(three, tiny_tokenizer):
    first = list(streamed(three, tiny_tokenizer, buffer=1)._pass(1))
    assert first == list(streamed(three, tiny_tokenizer, buffer=1)._pass(1))
    of_set = Counter(row["row_id"] % 3 for row in first)
    assert of_set[0] == 40
    assert 4 <= of_set[1] <= 16
    assert 20 <= of_set[2] <= 30
    assert len({row["row_id"] for row in first if row["row_id"] % 3 == 2}) == 10
    # mixed from the start to the end: no set is left over for long
    half = Counter(row["row_id"] % 3 for row in first[: len(first) // 2])
    assert 10 <= half[0] <= 30
    assert half[2] >= 5
    decoded = {row["row_id"]: tiny_tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in first}
    assert decoded[3 * 39] == "Question: 39 + 1?\nAnswer: a 39"
    assert decoded[3 * 9 + 2] == "c 9"


def test_a_stream_of_several_sets_reports_its_first_rows(recipe, three):
    report = prepare_data(recipe(dataset=three, streaming=True), say=quiet).report
    assert report.sampled
    assert len(report.parts) == 3
    assert sum(part.rows_taken for part in report.parts) == report.rows_kept > 60


# --- held-out sets ----------------------------------------------------------------------------------------------------


def test_named_held_out_sets_are_evaluated_apart_and_a_list_together(recipe, three, rows):
    named = prepare_data(recipe(dataset=rows(), eval_dataset={"pairs": three[0], "texts": three[2]["path"]}), say=quiet)
    assert {name: len(found) for name, found in named.held_out.items()} == {"pairs": 40, "texts": 10}
    assert [part.rows_in for part in named.held_out_report.parts] == [40, 10]
    together = prepare_data(recipe(dataset=rows(), eval_dataset=[three[0], three[2]["path"]]), say=quiet)
    assert len(together.held_out) == 50


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dataset": []}, r"dataset=\[\].*at least one"),
        ({"dataset": "[a.jsonl, null]"}, r"dataset='\[a.jsonl, null\]' is not a list.*Write"),
        ({"dataset": "builtin", "eval_dataset": {}}, r"eval_dataset=\{\}.*at least one"),
        ({"dataset": [{"path": "builtin", "weight": 1e9}]}, r"weight=1000000000.0.*at most 1000"),
        ({"dataset": [{"path": "builtin", "split": "dev"}]}, r"split 'dev'.*Correct split"),
        ({"dataset": [{"weight": 2}]}, r"dataset\[0\].*no path"),
        ({"dataset": [{"path": "builtin", "wieght": 2}]}, r"dataset\[0\] has 'wieght'.*Did you mean weight"),
        ({"dataset": [{"path": "builtin", "weight": 0}]}, r"dataset\[0\]: weight=0.*above 0"),
        ({"dataset": [{"path": "builtin", "weight": "much"}]}, r"dataset\[0\]: weight='much' is a text"),
        ({"dataset": ["builtin", ["builtin"]]}, r"dataset.*must be"),
        ({"dataset": {"a": "builtin"}}, r"dataset has 'a', but a data set has path"),
        ({"dataset": "builtin", "eval_dataset": [{"path": "builtin", "weight": 2}]}, "builtin the weight 2.*max_rows"),
        ({"dataset": "builtin", "eval_dataset": {"a b": "builtin"}}, "the name 'a b'.*letters"),
        ({"dataset": "~nobody/rows.csv"}, "~nobody/rows.csv'.*nothing at.*Correct"),
        ({"dataset": "x" * 300 + ".csv"}, "nothing at.*Correct"),
        ({"dataset": ["builtin", "none/rows.csv"]}, "none/rows.csv'.*nothing at.*Correct"),
        ({"dataset": "builtin", "columns": {"question": "problem"}}, "columns=.*would do nothing"),
        ({"dataset": "builtin", "dataset_revision": "main"}, "dataset_revision='main' would do nothing"),
        ({"dataset": "builtin", "dataset_config": "main"}, "dataset_config='main' would do nothing"),
        ({"dataset": "x/y", "columns": {"qestion": "problem"}}, "columns has qestion.*Did you mean question"),
        ({"dataset": "x/y", "columns": {"prompt": "text", "completion": "text"}}, "'text' two names.*Keep one"),
        ({"dataset": "x/y", "columns": {"prompt": 1}}, "'prompt': 1.*in quotes"),
        ({"dataset": "builtin", "dataset_split": "train[:x]"}, r"split 'train\[:x\]' cannot be read.*train\[:1000\]"),
        ({"dataset": "builtin", "dataset_split": "dev"}, "split 'dev'.*train, test, new_kinds.*dataset_split"),
        (
            {"dataset": "x/y", "dataset_split": "train[:5%]", "streaming": True},
            "length of a stream.*streaming to false",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_a_data_set_is_refused_before_a_row_is_read(recipe, settings, said):
    with pytest.raises(RecipeError, match=said) as error:
        recipe(**settings)
    assert "\n" not in str(error.value)


def test_what_a_recipe_says_of_its_own_data_set_does_not_refuse_one_in_its_place(recipe, rows, tmp_path):
    path = rows()
    recipe(
        dataset="org/rows", dataset_config="main", dataset_split="train_sft", eval_dataset="org/rows", eval_split="dev"
    )
    loaded = load_recipe(tmp_path / "recipe.yaml", ["--dataset", path, "--eval_dataset", path])
    assert loaded.data.dataset == path
    with pytest.raises(RecipeError, match="dataset_config='other' would do nothing"):
        load_recipe(tmp_path / "recipe.yaml", ["--dataset", path, "--eval_dataset", path, "--dataset_config", "other"])
