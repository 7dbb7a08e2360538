"""Generations on file, ours and others', graded again under every convention."""

import json
import os
import random
import re
import subprocess
import sys

import pytest

from eval.answers import CONVENTIONS, is_correct
from eval.grader.answers import Verdict
from eval.regrade import KINDS, describe, main, read_generations, regrade
from eval.report import scores as report_scores
from eval.report.scores import grade_rows, summarise
from eval.report.table import score_table
from eval.statistics import clustered_interval, wilson_interval
from matrix_llm.base.errors import EvalError
from tests.support.paths import ROOT


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def ours(number, response, gold, sample=0):
    return {
        "id": f"test/{number}", "sample": sample, "prompt_sha256": "0", "problem": f"Problem {number}?", "gold": gold,
        "subject": None, "level": None, "response": response, "finish_reason": "stop", "stop_reason": None,
        "prompt_tokens": 1, "tokens": 1,
    }  # fmt: skip


RESPONSES = ["The answer is: 7", "#### 7", "She has 7 left.", r"\boxed{7}", "The answer is 7.", "no idea", "7 of 9"]


def test_every_convention_is_scored_as_is_correct_scores_it(tmp_path):
    rows = [ours(i, response, "7") for i, response in enumerate(RESPONSES)]
    result = regrade(write(tmp_path / "a.jsonl", rows), "gsm8k")
    assert tuple(result["scores"]) == CONVENTIONS
    for convention, scores in result["scores"].items():
        right = sum(is_correct(row["response"], "7", benchmark="gsm8k", convention=convention) for row in rows)
        assert (scores["correct"], scores["total"]) == (right, len(rows))
        assert (scores["low"], scores["high"]) == wilson_interval(right, len(rows))
    assert result["scores"]["metamath"]["correct"] == 1
    assert result["scores"]["metamath"]["extraction_failures"] == 6


def test_a_regraded_run_has_the_scores_of_its_summary(tmp_path):
    draw = random.Random(0)
    rows = [ours(i, draw.choice(RESPONSES), str(draw.choice([7, 9])), sample) for i in range(13) for sample in range(3)]
    summary = summarise(rows, benchmark="gsm8k", settings={}, wall_seconds=1, versions={})
    draw.shuffle(rows)
    result = regrade(write(tmp_path / "a.jsonl", rows), "gsm8k")
    assert result["scores"] == summary["scores"]
    assert (result["rows"], result["problems"]) == (39, 13)
    for key in ("pass_at_k", "pass_at_k_intervals", "majority"):
        assert result[key] == summary[key]
    text = describe(result, show=0)
    assert "39 responses to 13 problems, 3 samples of each" in text
    assert [line for line in score_table(summary).splitlines() if "@" in line] == [
        line for line in text.splitlines() if "|" in line and "@" in line
    ]


@pytest.mark.parametrize("response", ["response", "completion", "generation", "output", "prediction"])
@pytest.mark.parametrize("gold", ["gold", "answer", "target", "expected"])
@pytest.mark.parametrize("problem", ["problem", "question", "prompt", None])
def test_other_peoples_names_are_read(tmp_path, response, gold, problem):
    row = {response: "The answer is: 18", gold: "9 * 2 = <<9*2=18>>18\n#### 18", "extra": {"a": 1}}
    row |= {problem: "How many?"} if problem else {}
    rows, bad = read_generations(write(tmp_path / "a.jsonl", [row]), "gsm8k")
    assert bad == []
    assert rows == [
        {
            "id": "line 1",
            "sample": 0,
            "line": 1,
            "problem": "How many?" if problem else "",
            "gold": "18",
            "response": "The answer is: 18",
        }
    ]


def test_our_names_come_before_theirs(tmp_path):
    row = {"response": "r", "output": "no", "gold": "1", "answer": "no", "problem": "p", "prompt": "no"}
    rows, _ = read_generations(write(tmp_path / "a.jsonl", [row]), "gsm8k")
    assert (rows[0]["response"], rows[0]["gold"], rows[0]["problem"]) == ("r", "1", "p")


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"answer": "so $\\boxed{1}$, then $\\boxed{\\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ({"solution": "so $\\boxed{1}$, then $\\fbox{\\frac{1}{2}}$."}, r"\frac{1}{2}"),
        ({"answer": r"\frac{1}{2}", "solution": "no box"}, r"\frac{1}{2}"),
        ({"gold": "3", "solution": r"\boxed{3}"}, "3"),
        ({"answer": 18}, "18"),
        ({"answer": -0.5}, "-0.5"),
    ],
)
def test_math_golds_are_the_last_box_or_the_answer_itself(tmp_path, row, gold):
    rows, bad = read_generations(write(tmp_path / "a.jsonl", [{"output": "x", **row}]), "math")
    assert bad == []
    assert rows[0]["gold"] == gold


def test_gsm8k_golds_are_cut_after_the_marks_and_keep_sign_and_comma(tmp_path):
    golds = ["a\n#### 1,250", "#### -3", " 18 ", 18, 2.5]
    rows, _ = read_generations(
        write(tmp_path / "a.jsonl", [{"output": "x", "answer": gold} for gold in golds]), "gsm8k"
    )
    assert [row["gold"] for row in rows] == ["1,250", "-3", "18", "18", "2.5"]


def test_rows_of_one_id_and_lists_of_responses_are_samples(tmp_path):
    rows = [
        {"id": 5, "output": "a", "gold": "1"},
        {"id": 6, "output": ["b", "c"], "gold": "1"},
        {"id": 5, "output": "d", "gold": "1"},
    ]
    read, _ = read_generations(write(tmp_path / "a.jsonl", rows), "gsm8k")
    assert [(row["id"], row["sample"], row["response"], row["line"]) for row in read] == [
        ("5", 0, "a", 1),
        ("6", 0, "b", 2),
        ("6", 1, "c", 2),
        ("5", 1, "d", 3),
    ]


def test_a_gold_that_pandas_wrote_is_its_whole_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"response": "#### 18", "gold": 18.0}\n')
    assert regrade(path, "gsm8k")["scores"]["strict"]["accuracy"] == 1


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for name, message in ((tmp_path / "pipe", "is a pipe or a device"), ("/proc/self/mem", "cannot be read")):
        assert main([str(name), "--benchmark", "gsm8k"]) == 1
        assert message in capsys.readouterr().err


BAD = [
    (b'{"response": "x", "gold": ', "not JSON"),
    (b"[1, 2]", "a list, not an object"),
    (b'{"gold": "1", "text": "x"}', "no text under response or .*; its fields are gold, text"),
    (b'{"response": null, "gold": "1"}', "no text under response"),
    (b'{"response": [], "gold": "1"}', "no text under response"),
    (b'{"response": ["a", 1], "gold": "1"}', "no text under response"),
    (b'{"response": "x"}', "no gold answer under gold or "),
    (b'{"response": "x", "gold": " "}', "no gold answer"),
    (b'{"response": "x", "gold": true}', "no gold answer"),
    (b'{"response": "x", "gold": NaN}', "no gold answer"),
    (b'{"response": "x", "gold": 1e999}', "no gold answer"),
    (b'{"response": "x", "gold": {"a": 1}}', "no gold answer"),
    (b'{"response": "\xff", "gold": "1"}', "not UTF-8"),
    (b"[" * 100_000, "recursion"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
@pytest.mark.parametrize("benchmark", ["gsm8k", "math"])
def test_a_bad_line_is_named_and_the_rest_is_graded(tmp_path, capsys, line, reason, benchmark):
    good = json.dumps(ours(0, r"The answer is: \boxed{7}", "7")).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + line + b"\n" + good.replace(b"test/0", b"test/1"))
    result = regrade(path, benchmark)
    assert [bad["line"] for bad in result["bad_lines"]] == [3]
    assert re.search(reason, result["bad_lines"][0]["reason"])
    assert result["scores"]["verified"]["total"] == 2
    assert main([str(path), "--benchmark", benchmark]) == 0
    printed = capsys.readouterr().out
    assert "warning: 1 lines hold no generation and are not counted" in printed
    assert re.search(f"  line 3: .*{reason}", printed)


def test_many_bad_lines_are_counted_and_the_first_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [ours(0, "7", "7"), *({"gold": "1"} for _ in range(30))])
    text = describe(regrade(path, "gsm8k"), show=0)
    assert "30 lines hold no generation" in text
    assert "line 6:" in text
    assert "line 7:" not in text
    assert "and 25 more" in text


@pytest.mark.parametrize("content", [b"", b"\n \n", b"{}\n[]\n", b'{"text": "a"}'])
def test_a_file_without_any_generation_is_an_error_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert main([str(path), "--benchmark", "gsm8k"]) == 1
    error = capsys.readouterr().err
    assert "holds no generation to grade" in error
    assert error.count("\n") == 1


def test_missing_files_folders_and_repeated_samples_are_refused(tmp_path):
    with pytest.raises(EvalError, match="does not exist"):
        regrade(tmp_path / "none.jsonl", "gsm8k")
    with pytest.raises(EvalError, match="is a folder"):
        regrade(tmp_path, "gsm8k")
    with pytest.raises(EvalError, match="two rows of one sample"):
        regrade(write(tmp_path / "a.jsonl", [ours(0, "7", "7"), ours(0, "8", "7")]), "gsm8k")


def test_rows_on_which_the_conventions_differ_are_listed_by_the_reason(tmp_path):
    """A disagreement needs two answers. That a convention found none is a matter of format, and stands apart."""
    rows = [
        ours(0, "The answer is: 7", "7"),  # strict, minerva and llemma find nothing
        ours(1, "#### 9\nThe answer is: 7", "7"),  # strict reads 9
        ours(2, "no idea", "7"),
        ours(3, "The answer is: 8", "7"),  # wrong for all that read it: no difference
        ours(
            4,
            "Final Answer: The final answer is $7$. I hope it is correct. The answer is 7 #### 7 The answer is: 7",
            "7",
        ),
    ]
    result = regrade(write(tmp_path / "a.jsonl", rows), "gsm8k")
    listed = {kind: [each["id"] for each in result[kind]] for kind in KINDS}
    assert listed == {
        "disagreements": ["test/1"],
        "answer_missing": ["test/0"],
        "no_answer": ["test/2"],
        "ungraded": [],
    }
    assert result["disagreements"][0]["verdicts"]["strict"] == {"correct": False, "extracted": "9", "reason": "unequal"}
    assert result["against_verified"]["strict"] == {
        "agree": 1, "disagree": 1, "only_theirs": 0, "only_ours": 2, "neither": 1, "ungraded": 0,
    }  # fmt: skip
    text = describe(result, show=2)
    assert "disagreements, 1 of 5 responses" in text
    assert "  metamath   right     7" in text
    assert "  strict     wrong     9" in text
    assert "test/0, sample 0, line 1: gold 7; right 7; no answer found by llemma, minerva, strict" in text
    assert re.search(r"\| strict +\| +1 \| +1 \| +2 \| +0 \| +1 \| +0 \|", text)
    assert "test/3" not in text
    assert describe(result, show=0).count("test/") == 0


def test_ungraded_responses_are_counted_and_listed_apart(tmp_path, monkeypatch):
    real = report_scores.grade

    def limited(response, gold, *, convention, **how):
        if convention == "verified" and "deep" in response:
            return Verdict(None, "9^9", "3 seconds were not enough")
        return real(response, gold, convention=convention, **how)

    monkeypatch.setattr(report_scores, "grade", limited)
    rows = [ours(0, "deep. The answer is: 7", "7"), ours(1, "The answer is: 7", "7")]
    result = regrade(write(tmp_path / "a.jsonl", rows), "gsm8k")
    assert [each["id"] for each in result["ungraded"]] == ["test/0"]
    assert [each["id"] for each in result["answer_missing"]] == ["test/0", "test/1"]
    assert all(sum(counts.values()) == 2 for counts in result["against_verified"].values())
    assert result["against_verified"]["metamath"]["ungraded"] == 1
    assert "ungraded by verified (3 seconds were not enough)" in describe(result, show=1)


def test_a_problem_counts_once_however_many_samples_it_has(tmp_path):
    """Other people's files may hold 1 sample of one problem and 3 of another."""
    rows = [
        ours(0, "#### 7", "7"),
        *(ours(1, f"#### {answer}", "7", sample) for sample, answer in enumerate([7, 8, 8])),
    ]
    result = regrade(write(tmp_path / "a.jsonl", rows), "gsm8k")
    scores = result["scores"]["verified"]
    assert scores["accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert (scores["correct"], scores["samples"], scores["total"]) == (2, 4, 2)
    assert (scores["low"], scores["high"]) == clustered_interval([1, 1 / 3], [1, 3])
    assert list(result["pass_at_k"]) == ["1"]
    assert result["pass_at_k"]["1"] == scores["accuracy"]
    assert "1 to 3 samples of each" in describe(result, show=0)


def test_the_question_of_a_row_reaches_the_grader(tmp_path):
    copied = {"response": r"It is \boxed{2^{10}}.", "gold": "1024"}
    rows = [{**copied, "problem": "Compute $2^{10}$."}, copied, {**copied, "response": r"\boxed{2^{10}}"}]
    result = regrade(write(tmp_path / "a.jsonl", rows), "math")
    verdicts = grade_rows(read_generations(tmp_path / "a.jsonl", "math")[0], benchmark="math")["verified"]
    assert [verdict.correct for verdict in verdicts] == [False, True, False]
    assert verdicts[0].reason == "the question copied"
    assert verdicts[2].reason == "a calculation that was not done"  # no question: a box alone has the gold's form
    assert result["scores"]["verified"]["correct"] == 1


def test_why_a_convention_finds_no_answer_is_said_from_the_responses(tmp_path):
    chat = [ours(i, f"So the result is **{i}**.", str(i)) for i in range(4)]
    text = describe(regrade(write(tmp_path / "a.jsonl", chat), "gsm8k"), show=0)
    assert 'llemma looks for digits right after "The answer is "; 0 of 4 responses have it' in text
    assert 'strict looks for "#### 7"; 0 of 4 responses have it' in text
    assert "flexible looks for" not in text
    marked = [ours(i, f"The answer is {i} #### {i}", str(i)) for i in range(3)] + chat[3:]
    text = describe(regrade(write(tmp_path / "b.jsonl", marked), "gsm8k"), show=0)
    assert "strict looks for" not in text
    assert "llemma looks for" not in text


def test_text_from_a_model_reaches_the_terminal_harmless(tmp_path, capsys):
    rows = [
        ours(0, "\x1b[2J\u202e The answer is: 7\x07", "7"),
        {**ours(1, "#### 7", "7"), "id": "\x1b[31m"},
        ours(2, "#### 8 \x1b[2J\u202e The answer is: 7\x07", "7"),
        {"\x1b[5m": 1},
    ]
    assert main([str(write(tmp_path / "a.jsonl", rows)), "--benchmark", "gsm8k"]) == 0
    printed = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", printed)
    assert "␛[2J⟨U+202E⟩" in printed


def test_the_command_prints_a_table_and_writes_everything(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [ours(i, response, "7") for i, response in enumerate(RESPONSES)])
    out = tmp_path / "deep" / "out.json"
    assert main([str(path), "--benchmark", "gsm8k", "--show", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    first = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert first[2 : 2 + len(CONVENTIONS)] == list(CONVENTIONS)
    assert json.loads(out.read_text()) == regrade(path, "gsm8k")


def test_an_out_that_cannot_be_written_is_one_line(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [ours(0, "7", "7")])
    (tmp_path / "file").write_text("")
    assert main([str(path), "--benchmark", "gsm8k", "--out", str(tmp_path / "file" / "out.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_script_runs_from_another_folder_without_torch(tmp_path):
    path = write(tmp_path / "a.jsonl", [ours(0, r"\boxed{\frac{1}{2}}", "0.5")])
    script = str(ROOT / "eval/regrade.py")
    code = (
        "import atexit, runpy, sys\n"
        "heavy = {'torch', 'transformers', 'vllm', 'datasets', 'pandas'}\n"
        "atexit.register(lambda: print('loaded:', sorted(heavy & set(sys.modules))))\n"
        f"sys.argv = ['x', {str(path)!r}, '--benchmark', 'math']; runpy.run_path({script!r}, run_name='__main__')"
    )
    for command in ([script, path, "--benchmark", "math"], ["-c", code]):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert re.search(r"\| verified +\| 100.00 % \|", done.stdout)
    assert "loaded: []" in done.stdout
