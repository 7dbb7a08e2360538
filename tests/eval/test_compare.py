"""Two runs compared: pairing, statistics, other conventions, what is said when they cannot be compared."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest

from eval.compare import compare, describe, main
from eval.report.scores import summarise
from eval.statistics import (
    bootstrap_difference,
    clustered_interval,
    mcnemar_exact,
    minimum_detectable_difference,
    sign_flip_test,
    two_proportion,
)
from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import write_text
from tests.support.paths import ROOT

SETTINGS = {"model": "a", "revision": "1", "prompt": "metamath", "temperature": 0.0, "n": 1}


def make_run(
    folder,
    answers,
    *,
    benchmark="gsm8k",
    generations=True,
    wording="The answer is: {}",
    samples=1,
    golds=None,
    **settings,
):
    """A run whose problem i is answered answers[i], for each sample or one for all, with gold i: generations and
    summary as a run writes them.
    """
    rows = [
        {
            "id": f"test/{i}",
            "sample": sample,
            "problem": f"What is {i}?\nThink.",
            "gold": str((golds or {}).get(i, i)),
            "subject": None,
            "level": None,
            "response": wording.format(answer[sample] if isinstance(answer, list) else answer),
            "finish_reason": "stop",
            "stop_reason": None,
            "prompt_tokens": 5,
            "tokens": 4,
        }
        for i, answer in answers.items()
        for sample in range(samples)
    ]
    summary = summarise(
        rows,
        benchmark=benchmark,
        settings={**SETTINGS, **settings},
        wall_seconds=1,
        versions={"torch": "2"},
        name="gsm8k",
        generations="gsm8k.jsonl",
    )
    path = folder / "gsm8k.json"
    write_text(path, json.dumps(summary))
    if generations:
        write_text(folder / "gsm8k.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(tmp_path, **settings):
    """101 problems: A alone is right on 0..2, B alone on 3..14, neither on 15..19, both on the rest."""
    a = {i: i if i < 3 or i >= 20 else -1 for i in range(101)}
    b = {i: i if 3 <= i < 15 or i >= 20 else -2 for i in range(101)}
    return make_run(tmp_path / "a", a), make_run(tmp_path / "b", b, model="b", **settings)


def test_the_numbers_are_those_of_the_pairs(tmp_path):
    result = compare(*pair(tmp_path))
    assert [result[key] for key in ("problems", "both", "only_a", "only_b", "neither")] == [101, 81, 3, 12, 5]
    assert (result["a"]["correct"], result["b"]["correct"]) == (84, 93)
    assert result["difference"] == 9 / 101
    assert result["mcnemar_p"] == mcnemar_exact(3, 12)
    assert result["unpaired_p"] == two_proportion(84, 101, 93, 101)
    assert result["minimum_detectable_difference"] == minimum_detectable_difference(101, 15 / 101)
    a = [i < 3 or i >= 20 for i in range(101)]
    b = [3 <= i < 15 or i >= 20 for i in range(101)]
    assert (result["difference_low"], result["difference_high"]) == bootstrap_difference(a, b)
    assert result["mcnemar_p"] < 0.05 < result["unpaired_p"]  # what pairing is for


def test_swapping_the_runs_turns_the_signs(tmp_path):
    a, b = pair(tmp_path)
    there, back = compare(a, b), compare(b, a)
    assert back["difference"] == -there["difference"]
    assert back["mcnemar_p"] == there["mcnemar_p"]
    assert back["difference_low"] == pytest.approx(-there["difference_high"], abs=0.011)
    assert "=> B is better than A beyond chance" in describe(there, show=0)
    assert "=> A is better than B beyond chance" in describe(back, show=0)


def test_a_run_against_itself_has_no_difference(tmp_path):
    a, _ = pair(tmp_path)
    result = compare(a, a)
    assert (result["difference"], result["mcnemar_p"], result["flipped"]) == (0.0, 1.0, [])
    assert result["minimum_detectable_difference"] is None
    text = describe(result, show=5)
    assert "no difference beyond chance" in text
    assert "too few problems flip" in text
    assert "warning" not in text


def test_flipped_problems_are_listed_with_both_answers(tmp_path):
    result = compare(*pair(tmp_path))
    assert [(flip["id"], flip["right"]) for flip in result["flipped"]] == [
        (f"test/{i}", "A" if i < 3 else "B") for i in range(15)
    ]
    assert result["flipped"][3] == {
        "id": "test/3",
        "right": "B",
        "share_a": 0.0,
        "share_b": 1.0,
        "problem": "What is 3?\nThink.",
        "gold": "3",
        "answer_a": "-1",
        "answer_b": "3",
        "generations": True,
    }
    text = describe(result, show=4)
    assert "flipped problems, 4 of 15" in text
    assert "  test/3: B alone is right; What is 3?\n      gold 3; A answers -1; B answers 3" in text
    assert "test/4" not in text
    assert "flipped problems" not in describe(result, show=0)


def test_without_generations_the_flips_still_have_their_ids(tmp_path):
    a = make_run(tmp_path / "a", {0: 0, 1: 5}, generations=False)
    b = make_run(tmp_path / "b", {0: 0, 1: 1}, generations=False)
    text = describe(compare(a, b), show=5)
    assert "  test/1: B alone is right" in text
    assert "answers" not in text


def test_another_convention_is_graded_from_the_generations(tmp_path):
    a = make_run(
        tmp_path / "a", {i: i for i in range(9)}, wording="So it is {}."
    )  # verified finds it, metamath does not
    b = make_run(tmp_path / "b", {i: i for i in range(9)})
    assert compare(a, b)["difference"] == 0
    result = compare(a, b, convention="metamath")
    assert (result["convention"], result["a"]["correct"], result["b"]["correct"]) == ("metamath", 0, 9)
    assert result["flipped"][0]["answer_a"] is None
    assert "A answers nothing; B answers 0" in describe(result, show=1)


def test_another_convention_without_generations_says_what_is_missing(tmp_path):
    a = make_run(tmp_path / "a", {0: 0, 1: 1})
    b = make_run(tmp_path / "b", {0: 0, 1: 1}, generations=False)
    with pytest.raises(EvalError, match=r"--convention strict.*lack 2 of its problems.*test/0.*leave --convention out"):
        compare(a, b, convention="strict")


def test_only_common_problems_are_compared_and_it_is_said(tmp_path):
    a = make_run(tmp_path / "a", {i: i for i in range(10)})
    b = make_run(tmp_path / "b", dict.fromkeys(range(6, 30), 0))
    result = compare(a, b)
    assert (result["problems"], result["only_a"]) == (4, 4)
    assert "note: compared on the 4 problems in both runs; A has 10, B has 24" in describe(result, show=0)


def test_runs_on_other_problems_or_another_benchmark_are_refused(tmp_path):
    a = make_run(tmp_path / "a", {0: 0})
    b = make_run(tmp_path / "b", {1: 1})
    with pytest.raises(EvalError, match="share no problem id"):
        compare(a, b)
    c = make_run(tmp_path / "c", {0: 0}, benchmark="math")
    with pytest.raises(EvalError, match=r"of gsm8k, .* of math: only runs on the same problems"):
        compare(a, c)


def test_the_same_ids_with_other_texts_are_noted(tmp_path):
    a = make_run(tmp_path / "a", {0: 0, 1: 1})
    b = make_run(tmp_path / "b", {0: 0, 1: 1})
    file = b.with_suffix(".jsonl")
    file.write_text(file.read_text().replace("What is 1?", "What is 1.0?"))
    assert "note: 1 problems have the same id and another text or gold" in describe(compare(a, b), show=0)


def test_settings_that_differ_are_named_and_the_model_is_not_one(tmp_path):
    a, b = pair(tmp_path, temperature=0.7, prompt="chat\x1b[31m", revision="2")
    result = compare(a, b)
    assert result["settings_that_differ"] == {"prompt": ["metamath", "chat\x1b[31m"], "temperature": [0.0, 0.7]}
    text = describe(result, show=0)
    warning = next(line for line in text.splitlines() if line.startswith("warning: settings differ"))
    assert warning.endswith("prompt: metamath and chat␛[31m; temperature: 0.0 and 0.7")
    assert "\x1b" not in text


def test_versions_that_differ_are_named(tmp_path):
    a, b = pair(tmp_path)
    summary = json.loads(b.read_text())
    b.write_text(json.dumps({**summary, "versions": {"torch": "3", "vllm": "1"}}))
    assert "warning: versions differ, which may move single answers: torch: 2 and 3; vllm: nothing and 1" in describe(
        compare(a, b), show=0
    )


def sampled_run(folder, right, **settings):
    """A run that is right on right[i] of the samples of problem i, of which each has as many as the largest count."""
    return make_run(
        folder, {i: [i] * count + [-1] * (max(right) - count) for i, count in enumerate(right)}, samples=max(right),
        **settings,
    )  # fmt: skip


def test_with_several_samples_a_problem_counts_by_the_share_that_is_right(tmp_path):
    draw = random.Random(0)
    right_a = [4, *(draw.choice([0, 1, 2, 4]) for _ in range(59))]
    right_b = [4, *(min(4, count + draw.choice([0, 0, 1, 2])) for count in right_a[1:])]
    a, b = sampled_run(tmp_path / "a", right_a), sampled_run(tmp_path / "b", right_b)
    result = compare(a, b)
    shares_a, shares_b = [count / 4 for count in right_a], [count / 4 for count in right_b]
    for side, shares, right, path in (("a", shares_a, right_a, a), ("b", shares_b, right_b, b)):
        score = json.loads(path.read_text())["scores"]["verified"]
        assert {key: result[side][key] for key in ("accuracy", "low", "high", "correct", "samples")} == {
            key: score[key] for key in ("accuracy", "low", "high", "correct", "samples")
        }
        assert (score["low"], score["high"]) == clustered_interval(shares, [4] * 60)
        assert score["accuracy"] == pytest.approx(sum(right) / 240)
    assert result["difference"] == pytest.approx(np.mean(shares_b) - np.mean(shares_a))
    assert (result["difference_low"], result["difference_high"]) == bootstrap_difference(shares_a, shares_b)
    assert (result["test"], result["p"]) == ("sign flips", sign_flip_test(shares_a, shares_b))
    assert "mcnemar_p" not in result
    assert result["b_better"] == sum(x < y for x, y in zip(right_a, right_b, strict=True))
    text = describe(result, show=3)
    assert "sign-flip test  p = " in text
    assert "McNemar" not in text
    assert "note: A has 4 samples a problem, B 4; a problem counts by the share that is right" in text
    assert re.search(r"test/\d+: right in \d+.00 % of A's samples, \d+.00 % of B's", text)
    assert abs(result["flipped"][0]["share_b"] - result["flipped"][0]["share_a"]) == 0.5  # the largest first


def test_problems_of_one_template_are_tested_as_one(tmp_path):
    """Two templates of 20 problems, of which B solves one as a whole: 20 problems apart, but one template."""
    paths = [make_run(tmp_path / name, {i: i if i < 20 or name == "b" else -1 for i in range(40)}) for name in "ab"]
    assert compare(*paths)["p"] < 1e-4
    for path in paths:
        file = path.with_suffix(".jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(
            "".join(json.dumps({**row, "template": number // 20}) + "\n" for number, row in enumerate(rows))
        )
    (note,) = [note for note in compare(*paths)["notes"] if "template" in note]
    assert "2 templates" in note
    assert "p = 1.000" in note


def test_one_sample_is_compared_with_several(tmp_path):
    a = make_run(tmp_path / "a", {0: 0, 1: -1})
    b = sampled_run(tmp_path / "b", [3, 1], n=3)
    result = compare(a, b)
    assert (result["a"]["accuracy"], result["b"]["accuracy"]) == (0.5, pytest.approx(2 / 3))
    assert (result["test"], result["b_better"]) == ("sign flips", 1)
    assert "no difference beyond chance (sign-flip p >= 0.05)" in describe(result, show=0)
    assert result["flipped"][0]["answer_b"] == "-1"  # what most samples say
    assert compare(a, b, convention="metamath")["b"]["accuracy"] == pytest.approx(2 / 3)


def test_a_summary_that_holds_one_verdict_of_several_samples_is_graded_from_the_generations(tmp_path):
    """As earlier versions wrote it. Its one verdict a problem is not the score."""
    a, b = sampled_run(tmp_path / "a", [1, 2]), make_run(tmp_path / "b", {0: 0, 1: 1})
    expected = compare(a, b)
    summary = json.loads(a.read_text())
    a.write_text(json.dumps({**summary, "verdicts": {"test/0": True, "test/1": True}}))
    assert compare(a, b) == expected
    a.with_suffix(".jsonl").unlink()
    with pytest.raises(EvalError, match=r"2 samples of each problem.*lack 2.*start the evaluation again"):
        compare(a, b)


@pytest.mark.parametrize(
    "line",
    ["[]", '"text"', '{"id": "test/0", "sample": 0}', '{"id": 1, "sample": "0", "response": "", "gold": ""}', "{"],
)
def test_a_line_beside_the_summary_that_is_no_generation_is_named(tmp_path, line):
    a, b = pair(tmp_path)
    with a.with_suffix(".jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(EvalError, match=r"gsm8k\.jsonl, line 102, is not a generation of ours"):
        compare(a, b)


def test_ungraded_counts_as_wrong_and_is_shown(tmp_path):
    a, b = pair(tmp_path)
    summary = json.loads(a.read_text())
    summary["verdicts"]["test/50"] = None
    a.write_text(json.dumps(summary))
    result = compare(a, b)
    assert (result["a"]["ungraded"], result["a"]["correct"], result["only_b"]) == (1, 83, 13)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", None, r"cannot be read \(No such file"),
        ("x.json", "{", "not JSON"),
        ("x.jsonl", '{"id": 1}\n{"id": 2}\n', r"graded by eval/regrade.py; their summary is x\.json"),
        ("x.json", "[1]", "lacks benchmark or verdicts"),
        ("x.settings.json", '{"model": "m"}', "lacks benchmark or verdicts"),
        (
            "x.json",
            '{"benchmark": "gsm8k", "verdicts": {"test/0": []}, "samples_per_problem": 0}',
            r"samples_per_problem=0.*Start the evaluation",
        ),
        ("x.json", '{"benchmark": "gsm8k", "verdicts": {"test/0": "true"}}', r"test/0 is 'true', where each is true"),
        ("x.json", '{"benchmark": "gsm8k", "verdicts": {"test/0": [1]}}', r"test/0 is \[1\], where each is true"),
        ("x.json", '{"benchmark": "gsm8k", "verdicts": {}, "settings": [1]}', r"settings=\[1\] must be an object"),
        ("x.json", '{"benchmark": "gsm8k", "verdicts": {}, "generations": 5}', r"generations=5 must be a text"),
        ("", None, r"is a folder\. Name a summary in it: gsm8k\.json\."),
    ],
)
def test_files_that_are_no_summary_are_refused_with_the_way_out(tmp_path, capsys, name, content, message):
    good, _ = pair(tmp_path)
    (tmp_path / "a" / "gsm8k.settings.json").write_text("{}")
    if content is not None:
        (tmp_path / "a" / name).write_text(content)
    assert main([str(good), str(tmp_path / "a" / name)]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_the_command_prints_a_table_or_json(tmp_path, capsys):
    a, b = pair(tmp_path)
    assert main([str(a), str(b), "--show", "2"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "gsm8k, convention verified, 101 problems",
        "83.17 %",
        "92.08 %",
        "B - A           +8.91 points",
        "p = 0.035",
        "flipped problems, 2 of 15",
    ):
        assert text in printed
    assert main([str(a), str(b), "--json", "--convention", "metamath"]) == 0
    assert json.loads(capsys.readouterr().out) == compare(a, b, convention="metamath")


def test_the_script_runs_from_another_folder_without_torch(tmp_path):
    a, b = pair(tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "eval/compare.py", a, b], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "exact McNemar   p = 0.035: 15 problems flip" in done.stdout
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from eval.compare import main; assert main(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, a, b], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
