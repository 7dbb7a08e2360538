"""The study's arms, and the text of its base."""

import json

import pytest

from benchmarks.study.design import ARMS, StudyError, choose_arms
from benchmarks.study.measure import PROBLEM_SEED
from benchmarks.study.text import write_base_text
from matrix_llm.base.files import read_jsonl
from matrix_llm.config import load_recipe
from matrix_llm.data.wordproblems import generate
from tests.support.paths import ROOT


def test_arms_bring_their_references_and_unknown_ones_are_named():
    assert [arm.name for arm in choose_arms("grad,weight3")] == ["ce", "mce", "weight3", "whole", "grad"]
    with pytest.raises(StudyError, match=r"--arms krilov.*krylov16"):
        choose_arms("main,krilov")


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
@pytest.mark.parametrize("recipe", ["tiny.yaml", "llemma7b.yaml"])
def test_every_arm_is_a_recipe_that_loads(arm, recipe):
    loaded = load_recipe(ROOT / "recipes" / recipe, arm.arguments, dry_run=True)
    for key, value in arm.overrides.items():
        assert str(getattr(loaded.training, key)).lower() == str(float(value) if key == "mce_weight" else value).lower()


def test_the_base_text_holds_all_sources_and_no_held_out_problem(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "One?", "answer": "It is <<1=1>>1.\n#### 1"}) + "\n")
    (tmp_path / "math.jsonl").write_text(json.dumps({"problem": "Two?", "solution": "$\\boxed{2}$"}) + "\n")
    assert write_base_text(tmp_path / "text.jsonl", [tmp_path / "train.jsonl", tmp_path / "math.jsonl"], 50) == 52
    texts = {row["text"] for row in read_jsonl(tmp_path / "text.jsonl")}
    assert {"Question: One?\nAnswer: It is 1.\nThe answer is: 1", "Question: Two?\nAnswer: $\\boxed{2}$"} <= texts
    held_out = generate(200, seed=PROBLEM_SEED, split="test")
    assert not any(problem.query in text for problem in held_out for text in texts)
