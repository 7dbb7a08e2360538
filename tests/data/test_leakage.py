"""Test questions among the training rows: found, reported, dropped, or a reason to stop."""

import itertools
import json
import tracemalloc
from pathlib import Path

import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data.entries import question_source
from matrix_llm.data.leakage import QuestionIndex, find_leaks
from matrix_llm.data.readers import Source
from matrix_llm.run import prepare
from matrix_llm.run.prepare import prepare_data
from matrix_llm.train import main
from tests.support.tiny import TINY

QUESTION = "Ana buys 3 pens at 4 dollars each and pays with a note of 20 dollars. How many dollars does she get back?"


def quiet(_):
    pass


@pytest.fixture
def test_set(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text(
        json.dumps({"question": QUESTION, "answer": "#### 8"}) + "\n" + json.dumps({"problem": "1 + 1?"})
    )
    return str(tmp_path / "gsm8k.jsonl")


PLANTED = {
    5: QUESTION.replace("Ana", "Zoe"),
    9: "$1+1$?",
    20: f"Read this. {QUESTION.upper()}",
    30: QUESTION[:60] + " How much is that?",
}


def test_leaked_rows_are_reported_and_kept(recipe, rows, test_set, tmp_path):
    said = []
    loaded = recipe(dataset=rows(40, PLANTED), leakage_check=[test_set])
    report = prepare_data(loaded, say=said.append).report
    written = json.loads((tmp_path / "run/leakage.json").read_text())
    assert written["leaked"] == [
        1,
        5,
        9,
        20,
    ]  # row 1 asks "1 + 1?" as well; row 30 holds less than half of the question's sequences
    assert (written["exact"], written["rows"], written["test_questions"], written["too_short"]) == (2, 40, 2, 1)
    assert {each["row"]: each["test"] for each in written["examples"]} == {
        1: f"{test_set}:2", 5: f"{test_set}:1", 9: f"{test_set}:2", 20: f"{test_set}:1",
    }  # fmt: skip
    assert "4 rows hold one of 2 test questions: 2 are equal to it" in said[0]
    assert "row 5 ~" in said[0]
    assert report.rows_kept == 40


@pytest.mark.parametrize("streaming", [False, True])
def test_leaked_rows_are_dropped_with_a_count(recipe, rows, test_set, streaming):
    more = {"streaming": True, "max_steps": 4} if streaming else {}
    loaded = recipe(dataset=rows(40, PLANTED), leakage_check=[test_set], leakage="drop", **more)
    prepared = prepare_data(loaded, say=quiet)
    report = prepared.report
    ids = [row["row_id"] for row in itertools.islice(prepared.train, 36)]
    assert sorted(ids) == sorted(set(range(40)) - {1, 5, 9, 20})
    assert (report.dropped_leaked, report.rows_kept) == (4, 36)
    assert any("4 rows dropped, found among the questions of leakage_check" in line for line in report.lines())


def test_stop_names_the_first_row_and_trains_nothing(tmp_path, rows, test_set, capsys):
    path = tmp_path / "r.yaml"
    settings = {
        **TINY,
        "dataset": rows(40, PLANTED),
        "leakage_check": [test_set],
        "leakage": "stop",
        "output_dir": str(tmp_path / "run"),
    }
    path.write_text(json.dumps(settings))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert f"4 of 40 training rows hold test questions, the first is row 1 ({test_set}:2)" in error
    assert [each.name for each in (tmp_path / "run").iterdir()] == ["leakage.json"]
    path.write_text(json.dumps({**settings, "dataset": rows(40, {1: "2 + 1?"})}))
    assert main([str(path)]) == 0  # nothing found, nothing stopped


def test_a_dry_run_reports_leaks_and_writes_nothing(recipe, rows, test_set, tmp_path):
    said = []
    prepare_data(recipe(dataset=rows(40, PLANTED), leakage_check=[test_set]), say=said.append, dry_run=True)
    assert "4 rows hold" in said[0]
    assert not (tmp_path / "run").exists()


def test_the_check_is_cached_by_the_content_of_both_sides(recipe, rows, test_set, monkeypatch):
    calls = []
    monkeypatch.setattr(prepare, "find_leaks", lambda *a: calls.append(1) or find_leaks(*a))

    def found(**changes):
        loaded = recipe(dataset=rows(40, PLANTED), leakage_check=[test_set], leakage="drop", **changes)
        return prepare_data(loaded, say=quiet).report.dropped_leaked

    assert (found(), found(), len(calls)) == (4, 4, 1)
    assert (found(leakage_share=0.1), len(calls)) == (5, 2)
    Path(test_set).write_text(json.dumps({"problem": "1 + 1?"}))
    assert (found(), len(calls)) == (2, 3)


def test_a_row_at_exactly_the_share_leaks_and_one_below_does_not():
    """Of the question's ten distinct 3-grams the first row holds five, the second four."""
    index = QuestionIndex([("t", "a b c d e f g h i j k l")], n=3)
    rows = ["a b c d e f g x", "a b c d e f x"]
    assert find_leaks(rows, index, ["t"], share=0.5).leaked == [0]
    assert find_leaks(rows, index, ["t"], share=0.4).leaked == [0, 1]


def test_short_questions_match_as_a_whole_only():
    index = QuestionIndex([("t", "What is 1 + 1?")])
    assert find_leaks(["So, what is 1 + 1? And 2 + 2?", "what is $1+1$?"], index, ["t"]).leaked == [1]


def test_a_test_set_without_questions_is_refused(recipe, rows, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"answer": "1"}\n')
    with pytest.raises(
        DataError, match=r"odd.jsonl line 1: leakage_check finds no question. A row needs one of: problem, question"
    ):
        prepare_data(recipe(dataset=rows(), leakage_check=[str(tmp_path / "odd.jsonl")]), say=quiet)


def test_a_hub_test_set_names_its_configuration(tmp_path, monkeypatch):
    assert question_source("openai/gsm8k:main") == Source("openai/gsm8k", "main", split="test")
    assert question_source("openai/gsm8k") == Source("openai/gsm8k", split="test")
    (tmp_path / "a:b.jsonl").write_text("")
    assert question_source(str(tmp_path / "a:b.jsonl")).config is None
    for config in ("main", "socratic"):
        (tmp_path / "gsm" / config).mkdir(parents=True)
        (tmp_path / "gsm" / config / "test.jsonl").write_text(json.dumps({"question": config}))
    assert [row for _, row in question_source(f"{tmp_path}/gsm:main").read()] == [{"question": "main"}]


def test_memory_of_the_check_does_not_grow_with_the_rows(tmp_path):
    peaks = []
    for count in (2000, 8000):
        texts = (
            f"Person {i} has {i * 7} pens and gives {i} of them to a friend. How many are left now, if any?"
            for i in range(count)
        )
        tracemalloc.start()
        find_leaks(texts, QuestionIndex([("t", QUESTION)]), ["t"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 10_000
