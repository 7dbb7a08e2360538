"""What the grader accepts, by kind of answer: the table in docs/evaluation.md, and more of each kind."""

from __future__ import annotations

import json
import re

import pytest

from eval.answers import accuracy_reward, grade, is_correct
from tests.support.paths import ROOT

DOCS = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
MATH = ROOT.parent / "shared" / "data" / "math" / "test.jsonl"


def policy() -> list[tuple[str, str, str, str]]:
    """(kind, gold, a right answer, a wrong one) of each row of the table; a code span may hold \\| for a bar."""
    table = DOCS.partition("## What counts as right")[2].partition("\n## ")[0]
    rows = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if len(cells) == 5 and cells[2].startswith("`"):
            gold, right, wrong = (cell.strip("`").replace("\\|", "|") for cell in cells[2:])
            rows.append((cells[0], gold, right, wrong))
    return rows


@pytest.mark.parametrize(("kind", "gold", "right", "wrong"), policy(), ids=lambda value: str(value)[:40])
def test_the_policy_is_as_documented(kind: str, gold: str, right: str, wrong: str) -> None:
    benchmark = "gsm8k" if "GSM8K" in kind else "math"

    def verdict(text: str) -> bool | None:
        states = r"\boxed" in text or "####" in text or "answer" in text.lower() or "$" in text.replace(r"\$", "")
        response = text.replace("⏎", "\n") if states else rf"So the answer is $\boxed{{{text}}}$."
        return grade(response, gold, benchmark=benchmark).correct

    assert verdict(right) is True
    assert verdict(wrong) is False


def test_the_policy_has_a_row_for_each_kind_that_is_asked_about() -> None:
    kinds = " ".join(kind for kind, *_ in policy()).lower()
    for word in ("unit", "order", "decimal", "several", "correct", "equation", "cut off", "percent", "words", "base"):
        assert word in kinds
    assert len(policy()) >= 30


# gold, answers that are right, answers that are wrong
ANSWERS = [
    # magnitudes: small and large numbers are compared by their digits
    (r"\frac{1}{3000!}", [r"\frac{1}{3000!}"], [r"\frac{1}{3001!}", "0"]),
    (r"10^{-40}", [r"\frac{1}{10^{40}}", "1e-40"], [r"10^{-41}", "0", "2 \\cdot 10^{-40}"]),
    (r"e^{-300}", [r"\frac{1}{e^{300}}"], [r"e^{-301}", "0"]),
    (r"3^{2005}-1", [r"3^{2005} - 1", r"-1+3\cdot 3^{2004}"], [r"3^{2005}+1", "3^{2005}"]),
    (r"\frac{\pi}{2^{90}}", [r"\pi \cdot 2^{-90}"], [r"\frac{\pi}{2^{91}}"]),
    ("0", [r"\sin \pi", r"\sqrt{2}-\sqrt{2}"], [r"10^{-90}", r"\sqrt{2} \cdot 10^{-80}"]),
    # formulas: equal everywhere, and not on one interval
    ("|x+1|", [r"\sqrt{(x+1)^2}", "|-x-1|"], ["x+1", "-x-1"]),
    ("|x-40|", ["|40-x|"], ["40-x", "x-40"]),
    (r"\lfloor x \rfloor + 1", [r"\lfloor x+1 \rfloor"], [r"\lceil x \rceil", "1", "x"]),
    (r"\sqrt{a^2b^2}", ["|ab|", "|a||b|"], ["ab"]),
    (r"\sqrt[4]{x^4}", ["|x|"], ["x"]),
    (r"\sqrt[3]{x^3}", ["x"], ["|x|"]),
    (r"\ln x^2", [r"2\ln x"], [r"\ln 2x"]),
    (r"\frac{x^2-1}{x-1}", ["x+1"], ["x-1", "|x+1|"]),
    (r"\frac{|x-7|}{x-7}", [r"\frac{x-7}{|x-7|}"], ["1", "-1"]),
    # a left side that names what is asked for
    (r"\begin{pmatrix} 2 & 0 \\ 1 & 3 \end{pmatrix}", [rf"{name} = \begin{{pmatrix}} 2 & 0 \\ 1 & 3 \end{{pmatrix}}" for name in (r"\mathbf{M}", "A", r"\mathbf{A}^{-1}")], [r"A = \begin{pmatrix} 2 & 0 \\ 1 & 4 \end{pmatrix}"]),
    ("13", [f"{name} = 13" for name in ("f(2)", "f(-1)", "g(f(2))", "f^{-1}(3)", "f'(2)", "a+b", "a^2+b^2", "xy", r"\frac{x}{y}", r"\text{Area}", r"\text{Total cost}", "P(A)", r"\angle ABC", r"\overline{AB}", r"\gcd(a,b)", "|z|", r"\sin\theta", "a_1+a_2", r"\|\mathbf{v}\|", "[ABC]")] + ["13 = x"], [f"{name} = 13" for name in ("2x", "x+3", "3x-1", r"\frac{x}{2}", "-x")] + ["f(13) = 2", "x \\ne 13", "x > 13"]),
    ("x+y=7", ["x+y=7", "2x+2y=14", "y=7-x"], ["7", "x+y=8"]),
    # words
    ("24", [r"\text{twenty-four}", r"2\text{ dozen}", r"4\text{ factorial}", r"24\text{ eggs}"], [r"24\text{ dozen}", r"24\text{ hundred}", r"24\text{ percent of } x", r"\text{more than }24", r"24\text{th}"]),
    ("1.5", [r"3\text{ halves}", r"\text{three halves}", r"\frac32"], [r"1.5\text{ million}", r"1.5\text{ tens}"]),
    ("0.6", [r"6\text{ tenths}", r"3\text{ fifths}"], ["6", r"6\text{ hundredths}"]),
    ("15", [r"6\text{ choose }2", r"\binom{6}{2}", r"{}_6C_2", r"{6 \choose 4}"], [r"15\text{ choose }2", r"15\text{ squared}", r"15\text{ or more}"]),
    ("205", [r"\text{two hundred five}", r"\text{two hundred and five}"], [r"\text{two hundred}", r"\text{fifty}"]),
    # lists, sets, tuples, signs
    ("100,200", ["200,100", "200, 100", r"100\text{ and }200"], ["100", "100,300"]),
    (r"\{100,200\}", [r"\{200,100\}"], [r"\{100200\}", "100200"]),
    ("2,100", ["2100", "2,100"], ["21,00", "2"]),
    (r"\pm 1 \pm \sqrt{2}", [r"1+\sqrt2, 1-\sqrt2, -1+\sqrt2, -1-\sqrt2"], [r"\pm(1+\sqrt{2})", r"1+\sqrt2"]),
    ("(1,2)", ["x=1,y=2", "y=2, x=1", r"x=1\text{ and }y=2", "(x,y)=(1,2)", "1,2"], ["x=2,y=1", "(y,x)=(1,2)", "(2,1)", "[1,2]"]),
    # sets of numbers
    (r"(-\infty,\infty)", [r"\mathbb{R}", r"x \in \mathbb{R}", r"\text{all real numbers}"], [r"\mathbb{R}\setminus\{0\}", r"(0,\infty)"]),
    (r"(-\infty,1)", ["-x>-1", "x<1", "1>x", "2x<2"], ["x>1", "-x<-1", "x \\le 1"]),
    (r"(-\infty,-2)\cup(2,\infty)", [r"x<-2 \text{ or } x>2", "x>2, x<-2"], [r"x<-2 \text{ and } x>2", "(-2,2)"]),
    ("(1,3)", [r"x>1 \text{ and } x<3", "1<x<3", r"\{x : 1<x<3\}"], [r"x>1 \text{ or } x<3", "[1,3)"]),
    (r"(-\infty,3)\cup(3,\infty)", [r"x \ne 3", r"\mathbb{R}\setminus\{3\}"], [r"\mathbb{R}\setminus\{-3\}", r"\mathbb{R}"]),
    # ratios, times, residues, bases
    ("2:3", ["4:6", r"\frac23", r"2\text{ to }3"], ["3:2", "2:4"]),
    ("3:45", ["3:45"], [r"\frac{1}{15}", "3:54"]),
    (r"12:00\text{ noon}", ["12:00", r"12:00 \text{ p.m.}"], [r"12:00\text{ midnight}", "1:00"]),
    ("5", [r"5\text{ mod }7", r"5\pmod{7}", r"x \equiv 5 \pmod 7"], [r"12 \pmod 7", r"5x \pmod 7"]),
    ("12_5", ["12_5", "12_{5}", "12"], ["12_6", "7"]),
    # angles
    (r"\frac{\sqrt{3}}{2}", [r"\sin 60^\circ", r"\cos 30^{\circ}", r"\sin(60^\circ)"], [r"\sin 60", r"\sin 30^\circ"]),
    (r"30^\circ", ["30", r"30\text{ degrees}"], [r"30^\circ 30'"]),
    # percents, units, decimals
    ("0.2", [r"20\%"], [r"0.2\%", r"2\%"]),
    ("20", [r"20\%"], ["0.2", r"200\%"]),
    (r"20\%", ["20", "0.2", r"\frac15"], [r"0.2\%", "2"]),
    (r"5\text{ feet}", ["5", r"60\text{ inches}", r"5\text{ ft}"], [r"5\text{ inches}", r"5\text{ square feet}"]),
    ("3", [r"3\text{ hours}", "3 h", r"3\text{ students}"], [r"3\text{ hours }15\text{ minutes}"]),
    (r"\$3.50", [r"350\text{ cents}", "3.5", r"3.50\text{ dollars}"], [r"35\text{ cents}", r"\$35"]),
    (r"\frac16", [r"0.1\overline{6}", r"0.1666\ldots", "0.16666667"], ["0.17", "0.1667"]),
    ("1234.5", ["1,234.5", "1.234,5"], ["1.2345", "12345"]),
    # words that are the answer
    ("C", [r"\text{(C)}", "(C) 12", "C: twelve"], ["(c)", "D"]),
    (r"\text{ellipse}", [r"\text{an ellipse}", "Ellipse"], [r"\text{not an ellipse}", r"\text{circle}"]),
    (r"\text{undefined}", [r"\text{does not exist}"], ["0", r"\text{defined}"]),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "right", "wrong"), ANSWERS, ids=[case[0][:30] for case in ANSWERS])
def test_answers_by_kind(gold: str, right: list[str], wrong: list[str]) -> None:
    for answer in right:
        assert is_correct(rf"So the answer is $\boxed{{{answer}}}$.", gold, benchmark="math"), answer
    for answer in wrong:
        assert not is_correct(rf"So the answer is $\boxed{{{answer}}}$.", gold, benchmark="math"), answer


GSM8K = [  # response, its answer, numbers that it mentions
    ("#### 2 million", "2000000", ["2"]),
    ("The answer is 2 dozen, i.e. 24 eggs.", "24", ["2"]),
    ("The answer is 7 1/2 hours.", "7.5", ["7", "0.5"]),
    ("The answer is 7½.", "7.5", ["7"]),
    (r"\boxed{2^{10}}", "1024", ["2", "10"]),
    (r"\boxed{\sqrt{16}}", "4", ["16"]),
    (r"\boxed{3 \times 4}", "12", ["3", "4"]),
    ("#### −5", "-5", ["5"]),
    ("#### 18\nThis is reasonable because we started with 16 eggs.", "18", ["16"]),
    ("The answer is 18.\nThe answer makes sense, since 16 - 7 = 9.", "18", ["9", "7"]),
    ("The answer is 12, where n = 3.", "12", ["3"]),
    ("#### 12 (if x = 3)", "12", ["3"]),
    ("The answer is 12 = 3 * 4.", "12", ["3", "4"]),
    ("The answer is 3 * 4 = 12.", "12", ["3", "4"]),
    ("The answer is 3 times 5, so 15.", "15", ["3", "5"]),
    ("The answer is not 5, it is 6.", "6", ["5"]),
    ("The answer is twenty-five.", "25", ["5", "20"]),
    ("The answer is 1.5e3.", "1500", ["1.5", "3"]),
    ("The answer is 9 500.", "9500", ["9", "500"]),
    ("The answer is 5 hours and 30 minutes.", "5.5", ["5", "30"]),
    ("The answer is 10 dollars and 50 cents.", "10.5", ["10", "50"]),
    (r"The final answer is: $\boxed{18}$ dollars. The answer is in dollars for 9 eggs.", "18", ["9"]),
    ("Question: how many are left?\nShe has 3 + 4 eggs.\nSo she has \\boxed{7}.", "7", ["3", "4"]),
    ("<think>The answer is 20.</think> The answer is 18.", "18", ["20"]),
    ("The answer is 5 or 6.", "", ["5", "6"]),
    ("The answer is 5-7.", "", ["5", "7"]),
    ("The answer is 3:45.", "", ["3", "45"]),
    ("The answer is x = 12, y = 5.", "", ["12", "5"]),
    ("I cannot determine this; see step 5", "", ["5"]),
    ("Steps:\n1. Add\n2. Subtract\n3.", "", ["3"]),
    ("<think>maybe the answer is 20", "", ["20"]),
    ("So \\boxed{5}. Therefore \\boxed{", "", ["5"]),
]  # fmt: skip


@pytest.mark.parametrize(("response", "right", "wrong"), GSM8K, ids=[case[0][:40] for case in GSM8K])
def test_gsm8k_takes_the_amount_that_is_stated(response: str, right: str, wrong: list[str]) -> None:
    assert not right or is_correct(response, right)
    for number in wrong:
        assert not is_correct(response, number), number


MATH_RESPONSES = [  # response, its answer, what it also mentions
    ("The value of $x$ is 2.", "2", ["x"]),
    ("Final Answer: The smallest such $n$ is $34$.", "34", ["n"]),
    ("Problem: Find $x$ with $2x=14$.\n\nSolution: $x=7$, so \\boxed{7}.", "7", ["14"]),
    ("We have 2 boxes of 3.\nQuestion: how many is that?\nSolution: \\boxed{6}", "6", ["3"]),
    ("\\boxed{7}\n\nProblem: Another?\nSolution: \\boxed{3}", "7", ["3"]),
    (r"$\boxed{\sqrt{2}}$. As a decimal the answer is 1.414.", r"\sqrt{2}", ["1.414"]),
    (r"The roots are $\boxed{-2} \quad \text{and} \quad \boxed{1}$.", "-2,1", ["-2"]),
    (r"It is $\boxed{14}$ or $\boxed{15}$.", "14,15", ["14", "15"]),
    ("so $\\boxed{44}$.\n\nWe may check our answer: $17 \\cdot 44 = 748$.", "44", ["748"]),
    (r"so \boxed\frac12", r"\frac12", ["1", "2"]),
    ("The answer is not $4$ but $5$.", "5", ["4"]),
    ("\\boxed{1} and \\boxed{2}. Wait, the answer is 4.", "4", ["1", "2", "1,2"]),
    ("I first thought \\boxed{3}. Wait, the answer is 4.", "4", ["3"]),
    ("Final Answer: The final answer is $3$. I hope it is correct. I apologize for the mistake. \\boxed{4}", "4", ["3"]),
    ("So we need $x >= 5$.", "", ["5"]),
    ("Now consider the case $n = 5", "", ["5"]),
    ("Let $f(x) = 5$. I am unable to solve this.", "", ["5"]),
    ("Suppose that $n=5$.", "", ["5"]),
    ("The answer is $2$ if $x>0$ and $3$ otherwise.", "", ["2", "3"]),
    ("so \\boxed{5}. Thus \\boxed{}", "", ["5"]),
    ("<think>so \\boxed{5}", "", ["5"]),
]  # fmt: skip


@pytest.mark.parametrize(("response", "right", "wrong"), MATH_RESPONSES, ids=[case[0][:40] for case in MATH_RESPONSES])
def test_math_takes_the_answer_that_is_stated(response: str, right: str, wrong: list[str]) -> None:
    assert not right or is_correct(response, right, benchmark="math")
    for other in wrong:
        assert not is_correct(response, other, benchmark="math"), other


def test_why_there_is_no_answer_is_said() -> None:
    for response, words in (
        ("<think>5", "reasoning was cut off"),
        ("Now consider the case $n = 5", "cut off"),
        ("I cannot determine this: 5", "gives up"),
        ("\\boxed{}", "empty"),
        ("Hence the sum is five more. " * 40, "loop"),
    ):
        verdict = grade(response, "5", benchmark="math")
        assert verdict.correct is False
        assert words in verdict.reason


# --- the question handed back -----------------------------------------------------------------------------------------


def test_a_formula_of_the_question_is_no_answer_where_the_question_is_known() -> None:
    question = r"Compute $\dbinom{22}{19}$."
    how = {"benchmark": "math", "problem": question}
    assert grade(r"The answer is $\boxed{\dbinom{22}{19}}$.", "1540", **how).reason == "the question copied"
    assert is_correct(r"The answer is $\boxed{1540}$.", "1540", **how)
    assert is_correct(r"\boxed{\frac12}", r"\frac12", benchmark="math", problem=r"Which is larger, $\frac12$ or $0.4$?")
    reward = accuracy_reward([r"\boxed{\dbinom{22}{19}}", r"\boxed{1540}"], answer=["1540"] * 2, prompts=[question] * 2)
    assert reward == [0.0, 1.0]


def test_a_long_calculation_is_no_answer_and_a_short_one_is() -> None:
    assert not is_correct(r"So it is $\boxed{(34-10)+(20-9)+(55-10)}$.", "80", benchmark="math")
    assert not is_correct(r"\boxed{102^2 - 98^2}", "800", benchmark="math")
    assert is_correct(r"So it is $\boxed{\binom{5}{2}}$.", "10", benchmark="math")
    assert is_correct(r"\boxed{\frac{1}{2}}", "0.5", benchmark="math")


@pytest.mark.slow
@pytest.mark.skipif(not MATH.is_file(), reason="the MATH file is not beside this clone")
def test_boxing_the_first_formula_of_each_question_scores_nothing() -> None:
    rows = [json.loads(line) for line in MATH.read_text(encoding="utf-8").splitlines()]
    bare = known = 0
    for row in rows:
        question = row.get("problem") or row["question"]
        found = re.search(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", question, re.S)
        if found:
            reply = rf"\boxed{{{next(filter(None, found.groups()))}}}"
            bare += is_correct(reply, row["answer"], benchmark="math")
            known += is_correct(f"So {reply}.", row["answer"], benchmark="math", problem=question)
    assert bare / len(rows) < 0.005
    assert known / len(rows) < 0.005


SUM = "If $x$ is a real number and $x^2 = 16$, what is the sum of all possible values of $x$?"


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (rf"So the final answer is \boxed{{3}}.⏎{SUM} The sum is $\boxed{{0}}$.", "3"),
        (f"So n = 20. The final answer is 20.⏎{SUM} The answer is: 0", "20"),
        (rf"Therefore the inefficiency of (6, 3) is 2.⏎{SUM} It is $4 + (-4) = \boxed{{0}}$.", "2"),
        # what is no new question: the question itself, one to oneself, one in passing, a correction
        (rf"{SUM}⏎The values are 4 and -4, so the sum is $\boxed{{0}}$.", "0"),
        (r"So x = 4.⏎But what is the other value of $x$ for which $x^2 = 16$ holds? It is -4: $\boxed{-4}$.", "-4"),
        (r"So x is 4.⏎The question asks: what is the sum of all possible values of $x$? It is $\boxed{0}$.", "0"),
        (r"Let $x=4$.⏎For which $y$ is $y^2 = 16$ and $y$ not equal to $x$, and what is it? $\boxed{-4}$", "-4"),
        (
            r"So it is $\boxed{8}$.⏎Actually, what is the sum of all possible values of $x$? It is $\boxed{0}$.",
            "0",
        ),
    ],
)
def test_a_question_asked_after_the_answer_is_another_problem(response: str, gold: str) -> None:
    assert grade(response.replace("⏎", "\n"), gold, benchmark="math").correct is True


def test_a_letter_of_the_question_may_be_its_answer() -> None:
    question = (
        "Find all functions $f$ from the integers to the integers with $f(f(n))=f(n)$ and $f$ injective for all $n$."
    )
    assert is_correct(r"So $\boxed{n}$.", "f(n)=n", benchmark="math", problem=question)
    assert not is_correct(r"So $\boxed{f(f(n))=f(n)}$.", "f(n)=n", benchmark="math", problem=question)
