"""The generated word problems: right answers, four styles, and splits that cannot meet."""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import astuple
from fractions import Fraction
from pathlib import Path

import pytest

from matrix_llm.base.errors import DataError
from matrix_llm.data import wordproblems
from matrix_llm.data.stories import FAMILIES, NEW_KINDS
from matrix_llm.data.wordproblems import COLUMNS, NAMES, SPLITS, STYLES, generate, main, split_of, write_jsonl
from tests.support.paths import ROOT

FAMILY = {family.name: family for family in FAMILIES + NEW_KINDS}
SAMPLE = {split: generate(4000, seed=3, split=split) for split in ("train", "test")}
UNSEEN = generate(2000, seed=3, split="new_kinds")
EVERY = SAMPLE["train"] + SAMPLE["test"] + UNSEEN

# Written out by hand, so that an error in a family's steps cannot hide behind itself. Arguments: as in `ranges`.
ANSWERS = {
    "change": lambda n, p, m: m - n * p,
    "share": lambda f, g, n: Fraction(f + g, n),
    "more": lambda f, d: f + (f + d),
    "fewer": lambda f, d: f + (f - d),
    "travel": lambda v, t, w: v * t + w,
    "savings": lambda s, t, g: g + s * t,
    "boxes": lambda n, p, k, q: n * p + k * q,
    "trade": lambda f, g, h: f - g + h,
    "times": lambda f, k, g: f * k - g,
    "reading": lambda p, t, m: m - p * t,
    "garden": lambda r, c, w: r * c - w,
    "voucher": lambda p, h, v: p + h - v,
    "ages": lambda f, d, k: f + d + k,
    "lawns": lambda n, e, k: Fraction(n * e, k),
    "typing": lambda v, w, t: (v + w) * t,
}
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
FOBAR = re.compile(r" If we know the answer to the above question is (\d+), what is the value of unknown variable x\?$")


def compute(left: int, operator: str, right: int) -> Fraction:
    return {
        "+": Fraction(left + right),
        "-": Fraction(left - right),
        "*": Fraction(left * right),
        "/": Fraction(left, right),
    }[operator]


def test_same_arguments_same_problems():
    assert generate(50, seed=7) == generate(50, seed=7)
    assert generate(50, seed=7) != generate(50, seed=8)
    assert generate(10, seed=7) == generate(20, seed=7)[:10]
    assert generate(0, seed=7) == []


def test_problems_do_not_depend_on_the_hash_seed_of_the_process():
    command = "from matrix_llm.data.wordproblems import generate; print(repr(generate(20, seed=1, split='test')))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", command], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": value},
            capture_output=True, text=True, check=True,
        ).stdout
        for value in ("1", "2")
    }  # fmt: skip
    assert printed == {repr(generate(20, seed=1, split="test")) + "\n"}


def test_splits_share_no_name_no_numbers_and_no_query():
    names = {split: set(NAMES[split]) for split in NAMES}
    assert not names["train"] & names["test"]
    numbers, queries = {}, {}
    for split, problems in SAMPLE.items():
        numbers[split] = {(p.family, p.operands) for p in problems}
        queries[split] = {text for p in problems for text in (p.query, p.original_question)}
        other = names["test" if split == "train" else "train"]
        for problem in problems:
            assert split_of(problem.family, problem.operands) == split
            for text in (problem.query, problem.original_question):
                words = set(re.findall(r"\w+", text))
                assert words & names[split], f"nobody is named: {text}"
                assert not words & other
    assert not numbers["train"] & numbers["test"]
    assert not queries["train"] & queries["test"]


def test_new_kinds_tell_no_story_of_training_and_name_nobody_of_it():
    stories = {split: {text_of(problem) for problem in problems} for split, problems in SAMPLE.items()}
    assert stories["train"] & stories["test"]  # the same kinds
    assert not stories["train"] & {text_of(problem) for problem in UNSEEN}
    for problem in UNSEEN:
        words = set(re.findall(r"\w+", problem.query))
        assert words & set(NAMES["test"])
        assert not words & set(NAMES["train"])


def text_of(problem) -> str:
    """The original question without its names and numbers."""
    return re.sub(r"\d+|\b[A-Z]\w+", "", problem.original_question)


def test_every_family_appears_in_every_style_and_every_inverse_is_asked():
    for split, problems in [*SAMPLE.items(), ("new_kinds", UNSEEN)]:
        of_split = {family.name: family for family in SPLITS[split]}
        assert {(p.family, p.type) for p in problems} == {(f, s) for f in of_split for s in STYLES}
        for style in ("GSM_SV", "GSM_FOBAR"):
            asked = defaultdict(set)
            for problem in problems:
                if problem.type == style:
                    asked[problem.family].add(problem.unknown)
            assert asked == {name: set(family.inverse) for name, family in of_split.items()}


def test_answers_match_formulas_written_by_hand():
    for problem in EVERY:
        operands = dict(zip(FAMILY[problem.family].ranges, problem.operands, strict=True))
        result = ANSWERS[problem.family](**operands)
        if problem.type in ("GSM_AnsAug", "GSM_Rephrased"):
            assert problem.answer == str(result)
            for number in problem.operands:  # reworded or not, the question gives every number
                assert re.search(rf"\b{number}\b", problem.query)
        else:
            assert int(problem.answer) == operands[problem.unknown]
            assert re.search(rf"\b{result}\b", problem.query)


def question_of(problem) -> str:
    """The last sentence of the original question, without the story."""
    return re.search(r"[^.]+\?$", problem.original_question).group().lstrip()


def test_x_put_back_gives_the_original_question():
    for problem in EVERY:
        if problem.type == "GSM_AnsAug":
            assert problem.query == problem.original_question
        elif problem.type == "GSM_Rephrased":
            assert problem.query != problem.original_question
        else:
            assert len(re.findall(r"\bx\b", problem.query)) == 2  # in the story, and in the closing question
            text = re.sub(r"\bx\b", problem.answer, problem.query, count=1)
            if problem.type == "GSM_FOBAR":
                assert FOBAR.sub("", text) == problem.original_question
            else:
                assert text.startswith(problem.original_question[: -len(question_of(problem))])
                assert text.endswith(" What is the value of unknown variable x?")
                assert "?" not in text[:-1]


def test_solutions_are_true_equations_that_use_known_numbers_and_end_in_the_answer():
    for problem in EVERY:
        body, closing = problem.response.split("\n")
        assert closing == f"The answer is: {problem.answer}"
        assert re.fullmatch(r"\d+", problem.answer)
        equations = EQUATION.findall(body)
        assert 2 <= len(equations) <= 3
        assert body.count("=") == len(equations) + body.count("So x =")  # nothing else claims equality
        known = set(re.findall(r"\d+", problem.query))
        for left, operator, right, value in equations:
            assert {left, right} <= known, problem
            assert compute(int(left), operator, int(right)) == int(value)
            assert 2 <= int(value) <= 60
            known.add(value)
        assert equations[-1][-1] == problem.answer
        assert ("So x = " in body) == (problem.type in ("GSM_SV", "GSM_FOBAR"))


def test_a_question_has_several_wordings_of_its_solution():
    wordings = defaultdict(set)
    for problem in SAMPLE["train"]:
        wordings[problem.family, problem.type].add(re.sub(r"\d+", "0", problem.response).split("\n")[0])
    assert min(len(texts) for texts in wordings.values()) >= 4


def test_negative_count_and_unknown_split_are_refused():
    with pytest.raises(DataError, match=r"count=-1.*0 problems or more"):
        generate(-1, seed=0)
    with pytest.raises(DataError, match=r"split='dev'.*train, test, new_kinds"):
        generate(1, seed=0, split="dev")


def test_command_line_writes_the_four_columns_from_any_folder(tmp_path):
    out = tmp_path / "new" / "test.jsonl"
    script = ROOT / "matrix_llm" / "data" / "wordproblems.py"
    command = [sys.executable, str(script), "--count", "25", "--seed", "5", "--split", "test", "--out", str(out)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert all(list(row) == list(COLUMNS) == ["query", "response", "type", "original_question"] for row in rows)
    assert [tuple(row.values()) for row in rows] == [astuple(p)[:4] for p in generate(25, seed=5, split="test")]


def test_command_line_reports_bad_arguments_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    with pytest.raises(SystemExit):
        main(["--count", "-3", "--out", str(out)])
    assert "count=-3" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_interrupted_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    out = tmp_path / "x.jsonl"
    write_jsonl(out, generate(3, seed=0))
    before = out.read_bytes()

    def broken():
        yield from generate(2, seed=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(out, broken())
    assert out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_standard_library_only():
    assert "torch" not in Path(wordproblems.__file__).read_text()
    code = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('w', sys.argv[1]); "
        "w = importlib.util.module_from_spec(spec); sys.modules['w'] = w; spec.loader.exec_module(w); "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", code, wordproblems.__file__]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "False False"
