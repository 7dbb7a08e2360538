"""Types, ranges and choices of one value."""

from dataclasses import dataclass

import pytest
import yaml

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.reader import Settings
from matrix_llm.base.values import Range, YamlLoader, check_choice, check_fields, read_numbers, setting


@dataclass
class Example:
    count: int = setting(3, at_least=1)
    share: float = setting(0.5, above=0, at_most=1, note="of all rows")
    steps: int = setting(-1, at_least=1, or_else=-1, note="epochs decide")
    solver: str | None = setting(None, choices=["exact", "krylov"])
    beta: float = 0.9
    flag: bool = False
    name: str | None = None
    names: list[str] | None = None
    learning_rate: float = 1e-3  # as transformers declares it, without a range


def read(tmp_path, line):
    (tmp_path / "r.yaml").write_text(line)
    return Settings({"part": Example}).read(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("count: ten", "count='ten' is a text.*must be an integer"),
        ("count: true", "count=True is true or false.*must be an integer"),
        ("count: 1.5", "count=1.5 is a number.*must be an integer"),
        ("flag: 1", "flag=1 is an integer.*must be true or false"),
        ("name: 7", "name=7 is an integer.*a text or null.*quotes"),
        ("beta: [0.9]", r"beta=\[0.9\] is a list.*must be a number"),
        ("names: [1]", r"names=\[1\].*must be a list or null"),
        ("solver: krilov", "solver='krilov'.*exact, krylov.*Did you mean krylov"),
        ("count: 0", "count=0.*at least 1"),
        ("share: 0", r"share=0 .*above 0 and at most 1 \(of all rows\)"),
        ("share: 1.5", "share=1.5.*at most 1"),
        ("steps: 0", r"steps=0.*at least 1, or -1 \(epochs decide\)"),
        ("share: .nan", "share=nan.*above 0"),
        ("beta: .inf", "beta=inf.*finite"),
        ("learning_rate: 0.0", "learning_rate=0.0.*above 0"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(tmp_path, line, refusal):
    with pytest.raises(RecipeError, match=rf"r\.yaml line 1: {refusal}"):
        read(tmp_path, line)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("count: '7'", 7),
        ("share: 1", 1),
        ("share: 5e-1", 0.5),
        ("steps: -1", -1),
        ("solver: null", None),
        ("solver: exact", "exact"),
        ("names: [a, b]", ["a", "b"]),
        (f"count: {10**400}", 10**400),
    ],
)
def test_an_allowed_value_is_read_in_its_type(tmp_path, line, value):
    (found,) = read(tmp_path, line).values()
    assert found == value
    assert type(found) is type(value)


def test_settings_given_in_python_are_checked_alike():
    example = Example(count="7", solver="exact", learning_rate=0.0)
    check_fields(example)
    assert (example.count, example.solver) == (7, "exact")
    assert example.learning_rate == 0.0  # declared elsewhere, checked by the reader alone
    for refused in ({"count": 0}, {"count": True}, {"solver": "taylor"}, {"share": "half"}):
        with pytest.raises(RecipeError, match=next(iter(refused))):
            check_fields(Example(**refused))


def test_a_range_holds_its_closed_ends_alone():
    assert [x in Range(above=0, at_most=1) for x in (0, 1e-9, 1, 1.1)] == [False, True, True, False]
    assert [x in Range(at_least=0, below=1) for x in (-1e-9, 0, 0.99, 1)] == [False, True, True, False]


def test_a_choice_may_name_what_else_is_allowed():
    with pytest.raises(RecipeError, match=r"source='lmhead'.*lm_head, input, or a path.*Did you mean lm_head"):
        check_choice("source", "lmhead", ["lm_head", "input"], also="a path")


@pytest.mark.parametrize("text", ["1e-6", "1E-06", "+1e-6", "0.1e-5", ".1e-5", "1.e-6"])
def test_an_exponent_without_a_point_is_a_number_at_any_depth(text):
    assert yaml.load(f"a: [{{b: {text}}}]", YamlLoader)["a"][0]["b"] == pytest.approx(1e-6)
    assert read_numbers({"a": [{"b": text}]})["a"][0]["b"] == pytest.approx(1e-6)


@pytest.mark.parametrize("text", ["e6", "1e", "-", "v1e5", "1e-6x", "max", "1-2", "."])
def test_a_text_that_spells_no_number_stays_a_text(text):
    assert read_numbers([text]) == [text]
    assert yaml.load(f"['{text}']", YamlLoader) == [text]
