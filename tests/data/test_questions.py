"""Questions compared: writings of one question are equal, two questions are not, and n-grams are counted exactly."""

import doctest

import pytest

from matrix_llm.data import questions
from matrix_llm.data.questions import QuestionIndex, normalise, words

# Pairs that differ in writing alone; the first four are the shape of MATH's real overlaps
SAME = [
    (r"A parabola with equation $y=x^2+bx+c$ passes.", "A parabola with equation  $y = x^2 + bx + c$ passes."),
    ("Find the value of $ab\\,$.", "Find the value of $ab\\,$.\n"),
    (r"solutions of $2x^2 + 3x - 5=0$.", r"solutions of $2x^{2}+3x-5=0$."),
    (r"$f(6) - f(2) = 12.$ What is $f(12) - f(2)?$", r"$f(6)-f(2)=12$. What is $f(12)-f(2)?"),
    (r"$\frac12$, $\frac 1{2}$, $\dfrac{1}2$", r"\(\tfrac{1}{2}\), \(\frac 12\), \[\frac{1}{2}\]"),
    (r"$\frac{x+1}y$", r"$\frac{x+1}{y}$"),
    (r"$\left( x,\ y \right]$ and $\left\{ 1 \right\}$", r"$(x,y]$ and $\{1\}$"),
    (r"$\sqrt2 + \sqrt{x}$", r"$\sqrt{2} + \sqrt x$"),
    (r"$a_1, a_{n}$", r"$a_{1},a_n$"),
    (r"$10{,}000$ or $10,\!000$", "10,000 or 10,000"),
    (r"How much is $\$5$?", "How much is $5?"),
    ("JANET\u2019s \u201cducks\u201d \u2212 16", 'Janet\'s "ducks" - 16'),
    ("x² + 10⁻³", r"$x^2 + 10^{-3}$"),
    ("\ufb01ve \uff11\uff12 kg", "five 12 kg"),
    ("It costs 2½ dollars.", "It costs 2 1/2 dollars."),
    ("a\u00a0b\u200bc", "a bc"),
    (r"$$\cos 150^\circ$$", r"$\cos 150^{\circ}$"),
    ("$5 x$", "$5x$"),
]

# Pairs that a check without signs, points, places or structure would call the same
DIFFERENT = [
    (r"Compute $\tan 22.5^\circ.$", r"Compute $\tan 225^\circ$."),
    (r"Compute $\cos (-150^\circ)$.", r"Compute $\cos 150^\circ$."),
    ("roots of $z^4 + z^2 + 1 = 0$", "roots of $z^4 - z^2 + 1 = 0$"),
    ("graph of $y = -f(-x)$", "graph of $y = f(-x)$"),
    (r"$x + \frac{1}{y} + 2018$", r"$x + \frac{1}{y} - 2018$"),
    ("$1 2$", "$12$"),
    ("$x^{12}$", "$x^12$"),  # x^1 2
    ("$x_{10}$", "$x_1 0$"),
    (r"$\frac{1}{23}$", r"$\frac{12}{3}$"),
    (r"$\frac12 3$", r"$\frac{1}{23}$"),
    (r"$\sqrt{23}$", r"$\sqrt23$"),
    ("$a(b+c)$", "$ab+c$"),
    ("x²", "x2"),
    ("He eats 2½.", "He eats 21/2."),
    (r"$\Delta$", r"$\delta$"),
    ("$3 < x$", "$3 > x$"),
    ("5!", "5"),
    (r"$x\\[2pt] y$", "$x[2pt] y$"),
    ("a is big", "a isbig"),
    ("more than 12. 5 more", "more than 12.5 more"),
    ("10% of 5", "10 of 5"),
]


def test_the_docstrings_are_true():
    result = doctest.testmod(questions)
    assert result.attempted >= 6
    assert result.failed == 0


@pytest.mark.parametrize(("a", "b"), SAME)
def test_two_writings_of_one_question_are_equal(a, b):
    assert normalise(a) == normalise(b)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_two_questions_stay_apart(a, b):
    assert normalise(a) != normalise(b)


@pytest.mark.parametrize("text", [text for pair in SAME + DIFFERENT for text in pair])
def test_a_normal_form_does_not_depend_on_outer_space(text):
    assert normalise(f" \n{text}\t ") == normalise(text)


@pytest.mark.parametrize(
    "text",
    ["", "\\", "{" * 5000, "\\frac" * 2000, "^" * 5000, "$" * 5000, "\\left" * 3000, " " * 100_000, "\\frac{" * 3000],
)
def test_odd_text_is_normalised_in_bounded_time(text):
    assert isinstance(normalise(text), str)
    assert QuestionIndex([("t", "What is 1 + 1?")]).match(text).equal == []


def test_signs_and_numbers_are_part_of_the_words():
    assert words(normalise(r"$\cos(-150^\circ) \neq 2.5$")) == ["cos", "-150", "circ", "ne", "2.5"]
    assert words(normalise(r"$p\neq 0$")) == words(normalise(r"$p\ne 0$"))


def test_a_share_counts_distinct_n_grams_and_exactly_the_share_is_enough():
    """The question has ten distinct 3-grams; the text holds six of them, three of those twice."""
    index = QuestionIndex([("t", "a b c d e f g h i j k l")], n=3)
    match = index.match("x e f g h i j k l e f g h i")
    assert match.shares == {0: 0.6}
    assert match.at_least(0.6) == {0: 0.6}
    assert match.at_least(0.61) == {}
    assert index.match("A b c d e f g h i j k l").at_least(1) == {0: 1.0}


def test_a_question_without_n_grams_is_found_only_as_a_whole():
    index = QuestionIndex([("t", "What is 1 + 1?")])
    assert index.too_short == 1
    assert index.match("What is 1 + 1? And 2 + 2?").at_least(0.01) == {}
    assert index.match("what is $1+1$?").at_least(1) == {0: 1.0}
