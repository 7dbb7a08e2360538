"""Prompt templates: the authors' own, custom ones, and what is refused."""

import json

import pytest

from matrix_llm.data.prompts import METAMATH_EVAL_SUFFIX, PROMPT_TEMPLATES, format_prompt
from tests.support.paths import SHARED

AUTHORS = SHARED / "data/prompts/alpaca_metamath.json"


@pytest.mark.skipif(not AUTHORS.is_file(), reason=f"the authors' prompts are not at {AUTHORS}")
def test_metamath_prompt_is_the_authors_byte_for_byte():
    authors = json.loads(AUTHORS.read_text(encoding="utf-8"))
    assert PROMPT_TEMPLATES["metamath"] == authors["metamath_train_no_input"]
    assert PROMPT_TEMPLATES["metamath"] + METAMATH_EVAL_SUFFIX == authors["metamath_eval"]


def test_braces_in_the_instruction_survive():
    assert format_prompt("plain", r"\frac{1}{2} {instruction}") == "Question: \\frac{1}{2} {instruction}\nAnswer:"


def test_custom_template_is_used_as_it_stands():
    assert format_prompt("Q {instruction} {x}", "1 + 1") == "Q 1 + 1 {x}"


def test_misspelt_template_names_the_nearest():
    with pytest.raises(ValueError, match=r"Did you mean 'metamath'\? Known templates: metamath, plain"):
        format_prompt("metamth", "1 + 1")


def test_template_with_two_places_is_refused():
    with pytest.raises(ValueError, match="2 times"):
        format_prompt("{instruction} {instruction}", "1 + 1")
