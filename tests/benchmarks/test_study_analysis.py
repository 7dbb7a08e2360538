"""The study's verdicts on rows whose truth is known."""

import math

import numpy as np
import pytest

from benchmarks.study import analysis, statistics
from benchmarks.study.design import StudyError
from benchmarks.study.folder import PROBLEMS
from benchmarks.study.tables import describe
from matrix_llm.base.files import read_jsonl
from tests.support.study import write_synthetic_study


def test_a_planted_difference_is_found_and_only_that(tmp_path):
    write_synthetic_study(tmp_path, {"ce": 0, "mce": 0.06, "weight3": 0, "input": 0})
    contrasts = {c.arm: c for c in analysis.analyse(read_jsonl(tmp_path / PROBLEMS))}
    assert {arm: c.differs for arm, c in contrasts.items()} == {"mce": True, "weight3": False, "input": True}
    assert contrasts["mce"].bootstrap[0] < 0.06 < contrasts["mce"].bootstrap[1]
    assert contrasts["input"].adjusted_p > contrasts["input"].test.p
    assert "mce is better than ce" in describe(contrasts["mce"], "heldout")
    assert "with 80 % power" in describe(contrasts["weight3"], "heldout")
    test = contrasts["weight3"].test
    two_ablations = statistics.minimum_detectable_effect(test.sd, 5, alpha=0.05 / 2)
    assert contrasts["weight3"].detectable == two_ablations


def test_the_rule_claims_a_difference_where_there_is_none_at_most_as_often_as_alpha(monkeypatch):
    def quick_bootstrap(differences):
        return statistics.hierarchical_bootstrap(differences, repeats=400)

    monkeypatch.setattr(analysis, "hierarchical_bootstrap", quick_bootstrap)
    rng, claimed, studies = np.random.default_rng(5), 0, 200
    for _ in range(studies):
        difficulty, rows = rng.uniform(0, 1, 300), []
        for arm in ("ce", "mce"):
            for seed in range(5):
                right = difficulty + rng.normal(0, 0.1, 300) < 0.6 + rng.normal(0, 0.02)
                correct = "".join(map(str, right.astype(int)))
                rows.append({"arm": arm, "seed": seed, "set": "heldout", "correct": correct})
        claimed += analysis.analyse(rows)[0].differs
    assert claimed / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)


def test_mcnemars_counts_are_the_problems_that_one_run_alone_solved():
    rows = [
        {"arm": "ce", "seed": 1, "set": "heldout", "correct": "1100"},
        {"arm": "mce", "seed": 1, "set": "heldout", "correct": "0111"},
    ]
    (contrast,) = analysis.analyse(rows)
    assert (contrast.mcnemar[0].arm_only, contrast.mcnemar[0].reference_only) == (2, 1)
    assert contrast.differences == (0.25,)


def test_runs_scored_on_different_numbers_of_problems_are_refused():
    rows = [
        {"arm": "ce", "seed": 1, "set": "heldout", "correct": "110"},
        {"arm": "mce", "seed": 1, "set": "heldout", "correct": "0111"},
    ]
    with pytest.raises(StudyError, match=r"mce and ce.*Score them again"):
        analysis.analyse(rows)
