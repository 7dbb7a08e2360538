"""What lm-evaluation-harness would ask and accept is what eval/gsm8k.py asks and accepts, where both mean the same."""

import re
from typing import Any

import pytest
import yaml
from jinja2 import Environment

from eval.answers import extract_answer, grade
from eval.generate.prompts import PROMPTS
from tests.support.paths import ROOT

TASKS = {"gsm8k_8shot": "gsm8k_8shot.yaml", "chat": "gsm8k_chat.yaml"}
QUESTIONS = ("How many?", "  Two spaces, $5, {braces} and\na line.", "Ünïcode's “quotes”")


def task(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "benchmarks/lm_eval" / TASKS[name]).read_text(encoding="utf-8"))


def render(template: str, **values: str) -> str:
    """As the harness renders a task's text."""
    return Environment(keep_trailing_newline=True).from_string(template).render(**values)


@pytest.mark.parametrize("name", TASKS)
def test_the_harness_is_asked_with_our_prompt_and_our_stop_strings(name: str) -> None:
    config, prompt = task(name), PROMPTS[name]
    for question in QUESTIONS:
        assert render(config["doc_to_text"], question=question) == prompt.template.replace("{instruction}", question)
    assert tuple(config["generation_kwargs"]["until"]) == prompt.stop
    assert config["num_fewshot"] == 0  # the worked examples are part of the text
    assert not config["generation_kwargs"]["do_sample"]


@pytest.mark.parametrize("name", TASKS)
def test_the_harness_reads_the_gold_answer_that_we_read(name: str) -> None:
    target = task(name)["doc_to_target"]
    assert render(target, answer="He has 2 * 9 = <<2*9=18>>18 left.\n#### 18") == "18"
    assert render(target, answer="#### 1,800 ") == "1,800"


def verdict_of_the_harness(filters: dict[str, Any], metric: dict[str, Any], response: str, gold: str) -> bool:
    """Its regex filter and its exact_match, for one response."""
    found = re.findall(filters["regex_pattern"], response)
    if not found:
        return False
    answer = found[filters.get("group_select", 0)]
    answer = next(filter(None, answer), "[invalid]") if isinstance(answer, tuple) else answer
    for pattern in metric["regexes_to_ignore"]:
        answer, gold = re.sub(pattern, "", answer), re.sub(pattern, "", gold)
    return answer.strip().lower() == gold.lower()


RESPONSES = (
    "#### 18", "#### 18.", "#### 18...", "#### $18", "#### 18.00", "18 dollars...", "It is $1,800.", "-18", "about 18%",
    "", "none", "#### 1,800.", "3 #### 18 and 4", "x = 18,", "18. Then 5..", "18$",
)  # fmt: skip


@pytest.mark.parametrize(("convention", "place"), [("strict", 0), ("flexible", 1)])
def test_strict_and_flexible_are_the_harness_rules_with_its_faults(convention: str, place: int) -> None:
    config = task("chat")
    rule, metric = config["filter_list"][place]["filter"][0], config["metric_list"][0]
    for response in RESPONSES:
        for gold in ("18", "1,800", "-18", "4"):
            theirs = verdict_of_the_harness(rule, metric, response, gold)
            assert grade(response, gold, convention=convention).correct == theirs, (response, gold)


def test_only_one_full_stop_is_dropped_after_a_number() -> None:
    assert extract_answer("18.", convention="flexible") == "18"
    assert extract_answer("18...", convention="flexible") == "18.."
    assert extract_answer("#### 18..", convention="strict") == "18."
