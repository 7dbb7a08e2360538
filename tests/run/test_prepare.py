"""What a run is given of its data: held-out rows read once for two uses, and a recipe that is left as it was."""

import copy
import json

import datasets
import pytest

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import load_recipe
from matrix_llm.data.readers import Source
from matrix_llm.data.wordproblems import generate
from matrix_llm.run.prepare import HeldOutProblem, prepare_data
from tests.support.tiny import TINY


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe(key=value) loads the tiny recipe on 20 built-in rows, with a cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**TINY, "builtin_rows": 20, "output_dir": str(tmp_path / "run"), **changes}))
        return load_recipe(path)

    return load


@pytest.fixture
def held_out(tmp_path):
    """A file of ten rows in which every third has no final answer."""
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}" if i % 3 else "No idea."} for i in range(10)]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepare(recipe):
    return prepare_data(recipe, say=lambda _: None)


def decoded(prepared):
    return [prepared.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in prepared.held_out]


@pytest.mark.parametrize(("eval_rows", "accuracy_rows"), [(5, 8), (8, 5), (8, 0)])
def test_generated_problems_and_eval_rows_are_the_first_of_the_test_split(recipe, eval_rows, accuracy_rows):
    prepared = prepare(recipe(eval_dataset="builtin", builtin_eval_rows=eval_rows, accuracy_rows=accuracy_rows, seed=7))
    made = generate(8, seed=7, split="test")
    assert prepared.problems == [HeldOutProblem(each.query, each.answer) for each in made[:accuracy_rows]]
    assert decoded(prepared) == [f"Question: {each.query}\nAnswer: {each.response}" for each in made[:eval_rows]]


@pytest.mark.parametrize(("eval_rows", "accuracy_rows"), [(4, 8), (8, 4), (None, 8), (None, 99)])
def test_problems_of_a_file_are_those_of_the_first_rows_that_have_an_answer(recipe, held_out, eval_rows, accuracy_rows):
    limit = {} if eval_rows is None else {"max_eval_rows": eval_rows}
    prepared = prepare(recipe(eval_dataset=held_out, accuracy_rows=accuracy_rows, **limit))
    expected = [HeldOutProblem(f"{i} + 1?", str(i + 1)) for i in range(10) if i % 3 and i < accuracy_rows]
    assert prepared.problems == expected
    assert len(prepared.held_out) == (10 if eval_rows is None else eval_rows)
    assert prepared.held_out_report.rows_in == len(prepared.held_out)


def test_held_out_rows_are_read_once(recipe, held_out, monkeypatch):
    read, original = [], Source.read
    monkeypatch.setattr(Source, "read", lambda self, **options: read.append(self.name) or original(self, **options))
    prepared = prepare(recipe(eval_dataset=held_out, max_eval_rows=4, accuracy_rows=8))
    assert (len(prepared.held_out), len(prepared.problems)) == (4, 5)
    assert read == ["builtin", held_out]


def test_accuracy_on_builtin_problems_needs_no_eval_dataset(recipe):
    prepared = prepare(recipe(accuracy_rows=6))
    assert prepared.held_out is None
    assert prepared.held_out_report is None
    assert [problem.query for problem in prepared.problems] == [
        each.query for each in generate(6, seed=42, split="test")
    ]


def test_without_eval_dataset_and_accuracy_nothing_is_held_out(recipe):
    prepared = prepare(recipe())
    assert (prepared.held_out, prepared.held_out_report, prepared.problems) == (None, None, [])


@pytest.mark.parametrize("row", [{"query": "Why?", "response": "Because."}, {"text": "#### 7"}], ids=str)
def test_accuracy_rows_without_a_problem_are_refused(recipe, tmp_path, row):
    (tmp_path / "none.jsonl").write_text(json.dumps(row))
    with pytest.raises(RecipeError, match=r"accuracy_rows=3.*none\.jsonl.*final answer.*accuracy_rows: 0"):
        prepare(recipe(eval_dataset=str(tmp_path / "none.jsonl"), accuracy_rows=3))


def test_the_recipe_is_left_as_it_was(recipe):
    loaded = recipe(eval_dataset="builtin", builtin_eval_rows=3, accuracy_rows=3)
    before = copy.deepcopy((vars(loaded.data), vars(loaded.model), loaded.training.to_dict()))
    prepare(loaded)
    assert (vars(loaded.data), vars(loaded.model), loaded.training.to_dict()) == before


@pytest.mark.parametrize("key", ["packing", "shuffle_dataset"])
def test_trl_prepares_the_rows_only_where_it_packs_or_shuffles_them(recipe, key):
    assert prepare(recipe()).dataset_kwargs == {"skip_prepare_dataset": True}
    assert prepare(recipe(**{key: True})).dataset_kwargs is None
