"""Text from rows, results and stored recipes stays text: on the terminal, and on a card."""

import json
import re

import pytest
import yaml

from matrix_llm.base.console import fail, say
from matrix_llm.base.text import quoted_lines, visible
from matrix_llm.publish.command import main as hub
from matrix_llm.publish.finished_run import recipe_yaml
from matrix_llm.train import main as train
from tests.support.finished_run import change_recipe, write_run
from tests.support.tiny import TINY

ESCAPES = [
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b2J",
    "a\rb",
    "a\x08b",
    "\u202eevil",
    "\u200b",
    "\x7f",
    "\u2028x",
    "\x00",
]
FORGED = ["=> accuracy after training: 100.0 %", "error: your token has expired", "   gold: 7"]


@pytest.mark.parametrize("text", ESCAPES, ids=ascii)
def test_what_is_printed_cannot_move_the_cursor_or_hide(text, capsys):
    say(f"=> {text}")
    fail(f"in {text}", 2)
    shown = capsys.readouterr()
    for line in (shown.out, shown.err):
        assert line == visible(line)
        assert line.count("\n") == 1
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("text", FORGED)
def test_a_line_of_data_cannot_pass_for_one_of_ours(text):
    for line_break in ("\n", "\r\n", "\n\n"):
        lines = quoted_lines(f"a{line_break}{text}").split("\n")
        assert all(line.startswith("     | ") for line in lines[1:])


@pytest.mark.parametrize("arguments", [[], ["--dry_run"]], ids=["run", "plan"])
def test_rows_reach_the_terminal_harmless(arguments, tmp_path, capsys):
    text = "\n".join([*FORGED, *ESCAPES[:4]])
    rows = [{"query": f"How many?\n{text}", "response": f"Two.\n{text}\nThe answer is: 2", "type": "GSM"}] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"dataset": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run"), "max_steps": 1}
    problems = {"eval_dataset": str(tmp_path / "rows.jsonl"), "accuracy_rows": 2, "accuracy_max_new_tokens": 2}
    recipe = {k: v for k, v in TINY.items() if k != "builtin_rows"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **settings, **problems, "max_length": 1024}))
    assert train([str(tmp_path / "recipe.yaml"), *arguments]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert "How many?" in shown
    for line in shown.splitlines():
        assert not line.startswith(tuple(FORGED[:2])), line


# -------------------------------------------------------------------------------------------------------------- cards

INJECTIONS = [
    "# A heading", "x\n\n# A heading", "```\n\n# Out of the block\n\n```", "~~~\n# Out\n~~~",
    "<script>alert(1)</script>",
    "[click](https://evil.example)", "![x](https://evil.example/pixel.png)", "https://evil.example", "www.evil.example",
    "| a | b |", "a\n---\nlicense: mit",
    "---\nlicense: mit\n---", "`code` and ``more``", "&lt;b&gt;", "a\u2028# b",
    "x\r\n# y", "{{ 7 * 7 }}", "{% raw %}", "<!-- ", "@everyone",
]  # fmt: skip


def by_name(run, text):
    result = run / "eval" / "gsm8k.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "name": text}))


def by_convention(run, text):
    result = run / "eval" / "gsm8k.json"
    content = json.loads(result.read_text())
    result.write_text(json.dumps({**content, "scores": {text: content["scores"]["verified"]}}))


def by_engine(run, text):
    result = run / "eval" / "gsm8k.json"
    result.write_text(json.dumps({**json.loads(result.read_text()), "settings": {"prompt": text, "engine": text}}))


def by_results(run, text):
    (run / "results.json").write_text(json.dumps({"steps": text, "train_rows": text}))


def by(key):
    return lambda run, text: change_recipe(run, **{key: text})


PLACES = {
    "name": by_name, "convention": by_convention, "engine": by_engine, "results": by_results, "dataset": by("dataset"),
    "solver": by("mce_solver"), "base": by("model_name_or_path"), "prompt": by("prompt_template"),
    "key": by("run_name"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_card(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("plain"))
    assert hub(["card", str(run)]) == 0
    return outline((run / "README.md").read_text())


def outline(card):
    """What a reader sees of a card's structure: front matter, headings, rows, links, images, blocks, HTML."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    header, body = yaml.safe_load(match[1]), match[2]
    fence = re.search(r"^(`{3,})yaml$", body, re.MULTILINE)[1]
    before, block, after = re.split(rf"^{fence}(?:yaml)?$", body, flags=re.MULTILINE)
    assert not re.search("```|~~~", block)
    text = re.sub(r"(`+)[^`].*?\1", "code", before + after)  # spans
    return {
        "licence": header.get("license"),
        "headings": [line for line in (before + after).splitlines() if re.match(r" {0,3}#", line)],
        "rows": sum(line.startswith("|") for line in before.splitlines()),
        "cells": sorted({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}),
        "links": re.findall(r"(?<!\\)\]\(([^)]*)\)", text),
        "addresses": re.findall(r"(?<!\()(?<!\\)\b(?:https?://|www\.)\S+", text),
        "html": re.findall(r"(?<!\\)<", text),
        "rules": [line for line in text.splitlines() if re.match(r"\s*(---|===|~~~)", line)],
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", INJECTIONS, ids=ascii)
def test_no_text_of_a_run_changes_what_its_card_is_made_of(place, text, tmp_path, plain_card, capsys):
    run = write_run(tmp_path)
    PLACES[place](run, text)
    status = hub(["card", str(run)])
    if status:
        assert capsys.readouterr().err.count("\n") == 1
        return
    assert outline((run / "README.md").read_text()) == plain_card


@pytest.mark.parametrize("text", INJECTIONS + ESCAPES, ids=ascii)
def test_a_published_recipe_says_what_the_stored_one_says(text):
    settings = {"prompt_template": text, text: [text, {"a": text}]}
    shown = recipe_yaml(settings)
    assert yaml.safe_load(shown) == settings
    assert "`" not in shown
    assert visible(shown) == shown
