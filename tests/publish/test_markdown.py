"""Text from outside keeps to its place in a card."""

import doctest

import pytest

from matrix_llm.publish import markdown
from matrix_llm.publish.markdown import code, fenced, quoted, text


def test_doctests():
    assert doctest.testmod(markdown).failed == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a_b 1.5 %", "a_b 1.5 %"),
        ("a|b", r"a\|b"),
        ("<i>", r"\<i>"),
        ("a\n\n# b", "a # b"),
        (3, "3"),
        (r"a\|b", r"a\\\|b"),
    ],
)
def test_text_is_one_line_without_markup(given, expected):
    assert text(given) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [("x", "`x`"), ("a`b", "``a`b``"), ("`", "`` ` ``"), ("a\nb", "`a b`"), ("a``b`c", "```a``b`c```")],
)
def test_a_code_span_is_fenced_by_more_ticks_than_it_holds(given, expected):
    assert code(given) == expected


def test_a_code_block_is_fenced_by_more_ticks_than_it_holds():
    assert fenced("a: 1\n", "yaml") == "```yaml\na: 1\n```"
    assert fenced("a: |\n  ````\n", "yaml") == "`````yaml\na: |\n  ````\n`````"


def test_a_quoted_string_is_pythons():
    for value in ('a"b', "a\nb", "a\\b", "ä"):
        assert eval(quoted(value)) == value
