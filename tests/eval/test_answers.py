"""The grader: what it must accept, what it must refuse, and what it must survive."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import threading
import time

import pytest

from eval.answers import BENCHMARKS, CONVENTIONS, accuracy_reward, answers_equal, extract_answer, grade, is_correct
from eval.grader import symbolic
from eval.grader.equality import same
from eval.grader.errors import UndecidedError, UngradedError
from eval.grader.kinds import Equation
from eval.grader.structures import read_structure
from tests.support.paths import ROOT

SHARED = ROOT.parent / "shared" / "data"

EQUAL = [
    ("18", "18.00"), ("1,234", "1234"), ("10,\\!080", "10080"), ("90{,}900{,}909", "90900909"), ("0.5", r"\frac{1}{2}"), ("1/2", r"\frac12"),
    (r"\dfrac{3}{4}", "0.75"), (r"-\frac{2}{3}", r"\frac{-2}{3}"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt 2}"), (r"3\sqrt{2}", r"\sqrt{18}"),
    (r"2\frac{1}{2}", r"\frac{5}{2}"), ("x^2+2x+1", "(x+1)^2"), (r"\text{(C)}", "C"), ("(C)", r"\text{C}"), (r"\text{Evelyn}", "Evelyn"),
    (r"4:30 \text{ p.m.}", r"\text{4:30 p.m.}"), (r"270/7\text{ degrees}", r"\frac{270}7\text{ degrees}"), (r"50\%", "50"), (r"\$2.50", "2.5"),
    (r"90^\circ", "90"), ("x = 5", "5"), ("y=2x+1", "2x+1"), ("5x-7y+11z+4=0", "-10x+14y-22z-8=0"), (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)"),
    ("1, 2, 3", r"\{3, 2, 1\}"), (r"1 \pm \sqrt{5}", r"1+\sqrt5, 1-\sqrt5"), ("x > 5", r"(5,\infty)"), (r"2 \le x < 3", "[2,3)"),
    (r"x \in [2,3]", "[2,3]"), (r"(-\infty,-4)\cup(6,\infty)", r"(6, \infty) \cup (-\infty, -4)"), ("40_9", "40_{9}"), ("664", "664_7"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"), (r"\begin{pmatrix} 1/2 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 0.5 \\ 2.0 \end{pmatrix}"),
    ("3:1", "3 : 1"), (r"7, -2, \text{ and } -5", "-5, -2, 7"), ("x²", "x^2"), ("½", r"\frac12"), ("−3", "-3"), (r"e^{i\pi}", "-1"), (r"\log_2 8", "3"),
    (r"\sin^2 x + \cos^2 x", "1"), ("5!", "120"), (r"\binom{5}{2}", "10"), ("0.333333", r"\frac13"), (r"\sqrt[3]{-8}", "-2"), ("six", "6"), ("2i+3", "3+2i"),
    (r"6.02 \times 10^{23}", "602000000000000000000000"), (r"a=9", "9"), (r"12 \text{ square units}", "12"), (r"5 cm", "5"), (r"f(x)=x+1", "x+1"),
    ("1 1/2", r"\frac32"), (r"0.\overline{3}", r"\frac13"), (r"0.1\overline{6}", r"\frac16"), ("x<-2 or x>2", r"(-\infty,-2)\cup(2,\infty)"), ("yes", r"\text{Yes}"),
    (r"36\pi cm^2", r"36\pi"), ("1 000", "1000"),
]  # fmt: skip
UNEQUAL = [
    ("18", "19"), ("(1,2)", "(2,1)"), ("[2,3]", "(2,3)"), ("[2,3]", "[2,3)"), ("0.33", r"\frac13"), ("3.14", r"\pi"), ("x+1", "x-1"), ("1,2", "1,2,3"),
    (r"\frac{1}{2}", r"\frac{2}{1}"), ("40_9", "40_8"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"), ("A", "B"),
    (r"\text{even}", r"\text{odd}"), ("", "5"), ("5", ""), ("", ""), ("3:1", "1:3"), (r"2\sqrt{3}", r"3\sqrt{2}"), ("east", "seat"), ("x>5", "x<5"),
    ("10^{18}", "10^{18}+1"), ("1000000000000000001", "1000000000000000000"), ("-5", "5"), ("x^2", "2x"), (r"\sqrt{2}", "1.414"), ("4:30 a.m.", "4:30 p.m."),
    ("225", "22.5"), ("2x=y", "3x=y"), (r"\infty", r"-\infty"), ("0", r"\infty"), ("y=2x", "y=3x"), ("5 and 6", "5"), ("1,2", "12"), ("4", "0,4"), (r"9\text{ a.m.}", r"9^\circ"), ("3+4=8", "7"), ("5=3", "3"),
    ("0.3", r"0.\overline{3}"), (r"\mathbb{R}\setminus\{3\}", r"\mathbb{R}\setminus\{-3\}"), ("-(6,5)", "(6,5)"), ("-5 apples", "5 apples"), ("1.5 apples", "15 apples"),
    (r"(-\infty,-5]\cap[5,\infty)", r"(-\infty,-5]\cup[5,\infty)"), ("2^{2005}-1", "2^{2005}+1"), ("f'(x)=x-1", "f'(x)=x+1"), ("A or B", "A"), ("A dog", "A"),
    ("-221_6", "-221_3"), ("12 13", "1213"), ("(1,234)", "1234"), (r"5\text{ million}", "5"), (r"3\text{ dozen}", "3"), ("1 2/5", "12/5"), ("11a+c", "7 = 11a+c"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "gold"), EQUAL)
def test_equal_answers_are_equal_both_ways(given: str, gold: str) -> None:
    assert answers_equal(given, gold)
    assert answers_equal(gold, given)


@pytest.mark.parametrize(("given", "gold"), UNEQUAL)
def test_unequal_answers_are_unequal_both_ways(given: str, gold: str) -> None:
    assert not answers_equal(given, gold)
    assert not answers_equal(gold, given)


RIGHT_GSM8K = [
    ("She has 3 + 4 = 7 left.\n#### 7\nThe answer is: 7", "7"),
    ("#### 1,200", "1200"),
    ("The answer is $\\boxed{18}$ dollars.", "18"),
    ("That makes 9 * 2 = $18 a day.", "18"),
    ("**Answer:** 18 eggs", "18"),
    ("The answer is 3 + 4 = 7.", "7"),
    ("The answer is 18.\n\nQ: Tom has 5 apples. How many?\nA: The answer is 5.", "18"),
    ("80 / 8 = 10. Therefore, John orders 10 pizzas so that each of his 20 friends has 4 slices.", "10"),
    ("The answer is: -3", "-3"),
    ("**Final Answer:** She sold **72** clips in 2 months.", "72"),
    ("She needs **12 apples** for the 3 days of the trip.", "12"),
    ("Step 3 answer: 5 apples. Final result: 12 apples", "12"),
    ("So she pays $7.50 in all. The answer is: $7.50", "7.5"),
]


@pytest.mark.parametrize(("response", "gold"), RIGHT_GSM8K)
def test_gsm8k_responses_that_a_reader_calls_right(response: str, gold: str) -> None:
    assert is_correct(response, gold)
    assert not is_correct(response, str(float(gold) + 1))


RIGHT_MATH = [
    (r"Hence $x = \boxed{\frac{1}{2}}$.", r"\frac12"),
    (r"so $\boxed{24}.$" + "\nFinal Answer: The final answer is $24$. I hope it is correct.", "24"),
    (r"We get $\fbox{3}$.", "3"),
    (r"The answer is: \frac{3}{4}.", "0.75"),
    (r"The answer is $(1,2)$.", "(1, 2)"),
    (r"\boxed{1} and \boxed{2}", "1,2"),
    (r"\boxed{7} is the smallest. So the answer is correct.", "7"),
    (r"Thus $19x - 4x + 1 - 81 = 15x - 80$.", "15x-80"),
    (r"The answer is (B).", r"\text{(B)}"),
    (r"first $\boxed{3}$, no: $\boxed{4}$", "4"),
    (r"in base ten \boxed{15\frac{39}{40}} or \boxed{\frac{639}{40}}", r"\frac{639}{40}"),
    (r"The answer is $289 - 225 = 64$.", "64"),
    ("The answer is: \\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("\\boxed{4}\nThe answer is 4 because $2^2$.", "4"),
    (r"The answer is: $\$5$", "5"),
    (r"so \boxed3", "3"),
    ("The answer is 18 eggs per day.", "18"),
    (r"\boxed{(C) 12 apples}", "C"),
]


@pytest.mark.parametrize(("response", "gold"), RIGHT_MATH)
def test_math_responses_that_a_reader_calls_right(response: str, gold: str) -> None:
    assert is_correct(response, gold, benchmark="math")
    assert not is_correct(response, "12345", benchmark="math")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_an_empty_box_and_a_loop_are_not_right_by_a_stray_number(benchmark: str) -> None:
    assert (
        extract_answer("We have 18 eggs, so the answer is \\boxed{}", convention="verified", benchmark=benchmark)
        is None
    )
    loop = "She sells the eggs for 18 dollars. " * 40
    assert extract_answer("First. " + loop, convention="verified", benchmark=benchmark) is None
    assert not is_correct("First. " + loop, "18", benchmark=benchmark)


def test_the_published_conventions_keep_their_rules_and_their_faults() -> None:
    assert extract_answer("The answer is: 1,234,567", convention="metamath") == "1234"
    assert extract_answer("The answer is: 16.5", convention="metamath") == "16"  # rounded, to even
    assert is_correct("The answer is: 16.5", "16", convention="metamath")
    assert extract_answer("The answer is: 16.7", convention="metamath") == "17"
    assert not is_correct("The answer is: 16.5", "16", convention="verified")
    assert extract_answer("The answer is: 3/0", convention="metamath") == "3"
    assert extract_answer("The answer is -3", convention="llemma") is None
    assert extract_answer("The answer is 3. The answer is 4", convention="llemma") == "3"
    assert extract_answer("#### 1,200.", convention="strict") == "1200"
    assert extract_answer("5 apples and 1,200 pears.", convention="flexible") == "1200"
    final = "Final Answer: The final answer is $x = 3$. "
    assert extract_answer(final, convention="minerva", benchmark="math") == "$x = 3$"
    assert is_correct(
        final.replace("x", "1"), "3", convention="minerva", benchmark="math"
    )  # only what follows the last "="
    assert is_correct("The answer is: 7.\nDone", "7", convention="metamath", benchmark="math")
    assert not is_correct(r"\boxed{\sqrt{18}}", r"3\sqrt{2}", convention="strict", benchmark="math")
    assert is_correct(r"\boxed{0.5}", r"\frac{1}{2}", convention="strict", benchmark="math")


def test_an_unknown_convention_or_benchmark_is_named() -> None:
    with pytest.raises(ValueError, match="convention='boxed' is not one of metamath"):
        extract_answer("5", convention="boxed")
    with pytest.raises(ValueError, match="benchmark='aime' is not one of gsm8k, math"):
        is_correct("5", "5", benchmark="aime")


def test_reward_is_one_where_right_for_texts_and_conversations() -> None:
    assert accuracy_reward([r"\boxed{2}", r"\boxed{3}"], answer=["2", "2"]) == [1.0, 0.0]
    assert accuracy_reward([[{"role": "assistant", "content": r"\boxed{2}"}]], answer=["2"]) == [1.0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the GSM8K and MATH files are not beside this clone")
def test_every_gold_of_gsm8k_and_math_equals_itself_and_its_solution_is_right() -> None:
    for line in (SHARED / "math" / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert answers_equal(row["answer"], row["answer"]), row["answer"]
        for convention in ("strict", "flexible"):
            assert is_correct(rf"\boxed{{{row['answer']}}}", row["answer"], benchmark="math", convention=convention), (
                row["answer"]
            )
        assert is_correct(f"So \\boxed{{{row['answer']}}}", row["answer"], benchmark="math"), row["answer"]
    for line in (SHARED / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)["answer"]
        gold = answer.split("#### ")[1]
        assert answers_equal(gold, gold)
        assert is_correct(answer, gold), answer
        # MetaMath's pattern reads one comma at most
        assert is_correct(f"The answer is: {gold}", gold, convention="metamath") == (gold.count(",") < 2)


@pytest.mark.parametrize(
    "text",
    ["x^{" * 60 + "1" + "}" * 60, "2^{30000}x", "2^{x+30000}", "(" * 70 + "x" + ")" * 70, "x+" * 200 + "x", "300000!x"],
)
def test_what_is_past_a_bound_is_undecided_before_it_costs_anything(text: str) -> None:
    with pytest.raises(UndecidedError):
        same(read_structure(text), read_structure(text + "+1"))


def test_brackets_within_brackets_end_at_a_depth() -> None:
    assert isinstance(read_structure("(" * 60 + "x=y" + ")" * 60), Equation)
    with pytest.raises(UndecidedError):
        read_structure("(" * 61 + "x=y" + ")" * 61)


HOSTILE = [
    "9^{9^{9^9}}", "\\boxed{" + "9^{" * 200, "{" * 1_000_000, "\\frac{" * 3000, "\\boxed{" + "(" * 5000 + ")" * 5000 + "}", "1" * 100_000,
    "\\boxed{" + "1" * 1900 + "^{" + "9" * 50 + "}}", "\x00\x01\x02\ud800\u202e", "\\boxed{\\sqrt" * 500, "\\boxed{(2^{1000})^{1000}}", "\\boxed{10^{-999999999}}",
    "\\boxed{200!!!!}", "\\boxed{\\binom{500}{250}^{1000}}", "\\boxed{" + "+".join("x" for _ in range(250)) + "}", "The answer is: " * 5000, "####" * 5000,
    "\\boxed{e^{e^{e^{e^{e}}}}}", "\\boxed{\\sin^{2000} 10^{4}}", "\\boxed{\\tan\\frac{\\pi}{2}}", "\\boxed{0^{-1}}", "\\boxed{1/0}", "\\boxed{\\pm" * 40, "\\boxed{a,}" * 3000,
    "\\boxed{x=y=z=" * 100, "\\boxed{\\begin{pmatrix}" + "1&" * 200 + "\\end{pmatrix}}", "$" * 10_000, "\\boxed{\\int_0^{10^{9}} x^{x} dx}",
    "\\boxed{\\sum_{k=1}^{10^{12}} k^k}", "\\boxed{" + "\\text{" * 300 + "}" * 301, "answer is " + "(" * 10_000, "1," * 20_000, "a" * 39_999 + "1", "\n" * 100_000, "answer is\n" * 4000, "#### " * 8000, "'" * 299 + "(" * 299 + "=" + ")" * 299, "[" * 290 + "<1" + "]" * 290,
]  # fmt: skip


def hostile(generator: random.Random) -> str:
    pieces = (
        "\\boxed{", "}", "{", "(", ")", "[", "]", "\\frac", "\\sqrt", "^", "_", "9", "9999999999", "x", "\\pm", ",", "=", "\\le", "<", "\\cup", "\\infty", "!",
        "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&", "\\text{", " and ", "The answer is: ", "#### ", "\n", "$", "\x00", "\u202e", "٣", "²", "%", "\\%", ":", "|", "\\left",
        "\\log", "\\sin", "i", "e", "\\pi", "-", "+", "*", "/", ".", "Final Answer: The final answer is", ". I hope it is correct.", "1e999", "\\binom", "'",
    )  # fmt: skip
    text = "".join(generator.choice(pieces) for _ in range(generator.randint(1, 40)))
    return text * generator.choice((1, 1, 1, 3)) if generator.random() < 0.9 else "\\boxed{" + text + "}"


@pytest.mark.slow
def test_hostile_texts_get_a_verdict_in_time_under_every_convention() -> None:
    for text in HOSTILE:
        for benchmark in BENCHMARKS:
            for convention in CONVENTIONS:
                for gold in ("5", text[:300]):
                    start = time.process_time()
                    grade(text, gold, benchmark=benchmark, convention=convention)
                    assert time.process_time() - start < 2, (text[:60], convention)


@pytest.mark.slow
def test_a_hundred_thousand_hostile_strings_neither_crash_nor_hang_nor_eat_memory() -> None:
    generator = random.Random(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    texts = [hostile(generator) for _ in range(100_000)]
    for index, text in enumerate(texts):
        start = time.process_time()
        # all conventions and both benchmarks come round; every text is graded under two of them
        for turn in (index, index + 5):
            grade(
                text,
                texts[index - 1][:200] or "5",
                benchmark=BENCHMARKS[turn % 2],
                convention=CONVENTIONS[(turn // 2) % 6],
            )
        assert time.process_time() - start < 2, text
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 600 * 1024, f"{grown / 1024:.0f} MiB more"


needs_math_verify = pytest.mark.skipif(not symbolic.available(), reason="math-verify is not installed")


@needs_math_verify
def test_the_last_rung_settles_what_the_parser_does_not_know() -> None:
    assert answers_equal(r"F_n = \sum_{k=0}^{n-1} F_{n-k-1} F_k", r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}")
    assert symbolic.equal(r"\frac{1}{2}", "0.5") is True
    assert symbolic.equal(r"\frac{1}{2}", "0.6") is False


@needs_math_verify
def test_a_pair_past_its_time_is_ungraded_and_the_next_pair_is_graded() -> None:
    assert symbolic.equal("1", "1") is True  # the worker is warm
    with pytest.raises(UngradedError, match="processor time"):
        symbolic.equal("9^{9^{9^{9}}}", "9^{9^{9^{8}}}", seconds=0.5)
    assert symbolic.equal("2", "2") is True


@needs_math_verify
def test_the_last_rung_works_in_a_thread() -> None:
    verdicts: list[bool | None] = []
    threads = [threading.Thread(target=lambda: verdicts.append(symbolic.equal("1/2", "0.5"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [True] * 3


def test_without_math_verify_what_it_would_decide_is_ungraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "available", lambda: False)
    text = r"\sum_{k=0}^{m} k^2"
    assert grade(rf"\boxed{{{text}}}", r"\sum_{k=1}^{m} k^2", benchmark="math").correct is None
    assert not is_correct(rf"\boxed{{{text}}}", r"\sum_{k=1}^{m} k^2", benchmark="math")


def test_grading_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import eval.answers; print(sorted({'torch', 'transformers', 'vllm', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
