"""Scores beside those of lm-evaluation-harness: both programs' files are read, and each difference gets its reason."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.agreement.answers import Answer, Found, read_answers
from benchmarks.agreement.compare import compare_rules, compare_texts, kind_of_difference, kind_of_disagreement
from benchmarks.agreement.tables import all_tables, make_rows, rule_table, score_table, text_table
from benchmarks.agreement.tokens import Reader
from benchmarks.harness_agreement import main
from eval.files import read_rows
from matrix_llm.base.errors import EvalError
from tests.support.paths import ROOT


def ours(index: int, response: str, gold: str = "18", finish: str = "stop") -> dict[str, Any]:
    return {
        "id": f"gsm8k/test/{index}", "sample": 0, "gold": gold, "response": response, "finish_reason": finish,
        "prompt_sha256": hashlib.sha256(f"prompt {index}".encode()).hexdigest(), "problem": "secret question",
    }  # fmt: skip


def theirs(index: int, response: str, found: str, correct: float, rule: str, gold: str = "18") -> dict[str, Any]:
    return {
        "doc_id": index, "doc": {"question": "secret question"}, "target": gold, "resps": [[response]],
        "arguments": {"gen_args_0": {"arg_0": f"prompt {index}", "arg_1": {}}}, "filtered_resps": [found],
        "filter": rule, "exact_match": correct,
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Three problems: the same text, a text that goes another way, and one that the limit cut."""
    mine = write(
        tmp_path / "gsm8k.jsonl",
        [ours(0, "so 18. The answer is 18"), ours(1, "2 + 2 = 4"), ours(2, "1 and then", finish="length")],
    )
    samples = []
    for index, text, flexible in (
        (0, "so 18. The answer is 18", "18"),
        (1, "2 + 3 = 18", "18"),
        (2, "1 and then 18", "18"),
    ):
        strict = "1" if index == 0 else "[invalid]"  # its pattern wants one more character, and takes the 8
        samples.append(theirs(index, text, strict, 0.0, "strict-match"))
        samples.append(theirs(index, text, flexible, 1.0, "flexible-extract"))
    return mine, write(tmp_path / "samples_task.jsonl", samples)


def test_both_programs_files_become_one_form(files: tuple[Path, Path]) -> None:
    mine, their = (read_answers(path) for path in files)
    assert list(mine) == list(their) == [0, 1, 2]
    assert mine[0].prompt_sha256 == their[0].prompt_sha256
    assert their[0].found["harness strict-match"] == Found("1", False)
    assert their[1].found["harness strict-match"] == Found(None, False)
    assert their[0].found["flexible"] == mine[0].found["flexible"] == Found("18", True)
    assert (mine[2].cut, their[2].cut) == (True, None)


def test_each_difference_of_two_texts_has_its_reason() -> None:
    answer = Answer(0, "18", "p", "a b 18", cut=False)

    def kind(text: str, **changes: Any) -> str | None:
        return kind_of_difference(answer, replace(answer, text=text, **changes))

    assert kind("a b 18") is None
    assert kind("a b  18\n") == "whitespace"
    assert kind("a c 18") == "another token"
    assert kind("a b", cut=True) == "cut at the limit"
    assert kind("a b") == "another end"
    assert kind("a b 18 and on") == "another end"
    assert kind("a b 18", prompt_sha256="q") == "another prompt"
    cut = replace(answer, cut=True)
    assert kind_of_difference(cut, replace(answer, text="a b 18 and on", cut=None)) == "cut at the limit"


def test_each_disagreement_of_two_rules_has_its_reason() -> None:
    assert kind_of_disagreement(Found("18", True), Found("18", True)) is None
    assert kind_of_disagreement(Found("4", False), Found("5", False)) is None
    assert kind_of_disagreement(Found(None, False), Found("18", True)) == "no answer found by the harness"
    assert kind_of_disagreement(Found("18", True), Found(None, False)) == "no answer found by ours"
    assert kind_of_disagreement(Found("1", False), Found("18", True)) == "another number read"
    assert kind_of_disagreement(Found("$18.", False), Found("18", True)) == "the same number, judged differently"


def test_runs_are_compared_on_the_problems_that_both_answered(files: tuple[Path, Path]) -> None:
    mine, their = (read_answers(path) for path in files)
    del their[0]
    assert [(each.index, each.kind, each.shared) for each in compare_texts(mine, their)] == [
        (1, "another token", 4),
        (2, "cut at the limit", 10),
    ]


def test_rules_are_compared_on_the_harness_own_texts(files: tuple[Path, Path]) -> None:
    mine, their = (read_answers(path) for path in files)
    assert compare_rules(mine) == []
    agreements = {(each.theirs, each.ours): each for each in compare_rules(their)}
    assert agreements["harness flexible-extract", "flexible"].disagreements == ()
    assert agreements["harness strict-match", "llemma"].disagreements == ((0, "another number read"),)


def test_the_tables_come_from_rows_without_any_text(files: tuple[Path, Path]) -> None:
    rows = make_rows({"ours": read_answers(files[0]), "harness": read_answers(files[1])})
    stored = json.loads(json.dumps(rows))
    assert "secret" not in json.dumps(rows)
    assert "The answer is" not in json.dumps(rows)
    assert "| ours | flexible | 1 / 3 | 33.3% | 6.1% to 79.2% | 0 |" in score_table(stored)
    assert "| harness | harness flexible-extract | 3 / 3 | 100.0% |" in score_table(stored)
    assert "| ours / harness | 3 | 1 | 1 another token, 1 cut at the limit | 1 | 1 |" in text_table(stored)
    assert "| harness | strict-match | llemma | 2 / 3 | 1 another number read |" in rule_table(stored)


def test_the_command_writes_rows_from_which_it_prints_the_same_tables(
    files: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    rows = tmp_path / "rows.jsonl"
    assert main([f"ours={files[0]}", f"harness={files[1]}", "--rows", str(rows)]) == 0
    first = capsys.readouterr().out
    assert main(["--tables", str(rows)]) == 0
    assert capsys.readouterr().out == first != ""


def bad_files(tmp_path: Path) -> dict[str, list[str]]:
    good = write(tmp_path / "good.jsonl", [ours(0, "18")])
    repeated = theirs(0, "18", "18", 1.0, "strict-match") | {"resps": [["18", "19"]]}
    return {
        "NAME=FILE": [str(good)],
        "given twice": [f"a={good}", f"a={good}"],
        "at least twice": [f"a={good}"],
        "does not exist": [f"a={good}", "b=/no/such.jsonl"],
        "different gold": [f"a={good}", f"b={write(tmp_path / 'gold.jsonl', [ours(0, '18', gold='19')])}"],
        "in common": [f"a={good}", f"b={write(tmp_path / 'others.jsonl', [ours(7, '18')])}"],
        "again": [f"a={good}", f"b={write(tmp_path / 'twice.jsonl', [ours(0, '18'), ours(0, '18')])}"],
        "prompt_sha256": [
            f"a={good}",
            f"b={write(tmp_path / 'rows.jsonl', [{'id': 'x/1', 'sample': 0, 'gold': '1'}])}",
        ],
        "its id": [f"a={good}", f"b={write(tmp_path / 'ids.jsonl', [ours(0, '18') | {'id': 'mine'}])}"],
        "sample is not 0": [f"a={good}", f"b={write(tmp_path / 'n.jsonl', [ours(0, '18') | {'sample': 1}])}"],
        "Leave NAME=FILE": [f"a={good}", "--tables", str(good)],
        "no rows of a run": ["--tables", str(good)],
        "config.json": [f"a={good}", f"b={good}", "--model", str(tmp_path)],
        "several times": [f"a={good}", f"b={write(tmp_path / 'repeats.jsonl', [repeated])}"],
        "holds no answers": [f"a={good}", f"b={write(tmp_path / 'none.jsonl', [])}"],
    }


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    for told, arguments in bad_files(tmp_path).items():
        assert main(arguments) == 2, told
        error = capsys.readouterr().err
        assert told in error, (told, error)
        assert error.count("\n") == 1, (told, error)


def test_a_file_of_neither_program_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"filtered_resps": ["1"], "filter": "strict-match"}])
    with pytest.raises(EvalError, match=r"row 1 .*'arguments'.*--log_samples"):
        read_answers(path)


def test_where_two_texts_part_the_model_tells_how_near_the_other_token_was(
    tmp_path: Path, tiny_tokenizer: Any, tiny_llama: Any
) -> None:
    tiny_llama(512).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    reader = Reader(tmp_path)
    prompt, texts = "Question: 1 + 1?\nAnswer:", (" He has 1 pen.", " He has 2 pens.")
    one, two = (tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    place = len(tiny_tokenizer(" He has ", add_special_tokens=False)["input_ids"])
    assert one[:place] == two[:place]
    assert one[place] != two[place]
    before = [*tiny_tokenizer(prompt)["input_ids"], *one[:place]]
    with torch.no_grad():
        first, second = reader.model(input_ids=torch.tensor([before])).logits[0, -1].topk(2).values.tolist()
    parting = reader.parting(prompt, *texts)
    assert parting.tokens == place
    assert parting.gap == pytest.approx(first - second, abs=1e-5)
    assert not parting.top_two  # of 300 tokens, a random model prefers others to 1 and 2


@pytest.mark.parametrize("prompt", ["8shot", "chat"])
def test_the_page_of_scores_is_what_its_rows_say(prompt: str) -> None:
    page = (ROOT / "docs/pretrained_scores.md").read_text(encoding="utf-8")
    rows = list(read_rows(ROOT / f"docs/pretrained_scores_{prompt}.jsonl"))
    for table in all_tables(rows).split("\n\n"):
        assert table in page
