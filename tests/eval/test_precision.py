"""What is said below the table: intervals by template, and a warning where an interval is wide."""

import pytest

from eval.grader.answers import Verdict
from eval.report.precision import between_problems, precision_notes, template_score
from eval.report.scores import score
from matrix_llm.base.statistics import wilson_interval


def summary_of(shares, samples=1, **more):
    """The summary of a run whose problems have these shares of right samples, as far as the notes read it."""
    verdicts = [[index < round(share * samples) for index in range(samples)] for share in shares]
    graded = [[Verdict(each, "1") for each in problem] for problem in verdicts]
    return {
        "problems": len(shares),
        "samples_per_problem": samples,
        "convention": "verified",
        "scores": {"verified": score(graded)},
        "verdicts": {str(index): each if samples > 1 else each[0] for index, each in enumerate(verdicts)},
        **more,
    }


def test_an_interval_is_clustered_by_the_template_that_problems_are_made_from():
    shares = [1.0] * 500 + [0.0] * 500  # ten templates of 100 problems, each solved or not as a whole
    rows = [{"id": str(index), "sample": 0, "template": index // 100} for index in range(1000)]
    summary = summary_of(shares)
    found = template_score(summary, rows)
    assert (found["templates"], found["accuracy"]) == (10, 0.5)
    assert (found["low"], found["high"]) == wilson_interval(5, 10)
    assert template_score(summary, [{"id": str(index), "sample": 0} for index in range(1000)]) is None
    notes = precision_notes(summary | {"templates": found})
    assert "1,000 problems are made from 10 templates" in notes[0]
    assert "23.7 to 76.3" in notes[0]
    assert "templates would make it 5, and there are 10" in notes[1]


def test_a_wide_interval_is_warned_of_with_what_would_narrow_it():
    (note,) = precision_notes(summary_of([1.0, 0.0, 0.0] * 10))
    assert note.startswith("warning: the 95 % interval is 32.0 points wide")
    assert "about 1,228 problems" in note
    assert "never beyond what 30 problems allow" in note
    (note,) = precision_notes(summary_of([1.0, 0.0, 0.5] * 10, samples=16))
    assert "at best" in note
    assert not precision_notes(summary_of([1.0, 0.0] * 800))
    assert not precision_notes(summary_of([0.0] * 100 + [1.0] * 1219))


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.0), (0.0, 1.0)])
def test_what_no_number_of_samples_removes(share, expected):
    """Problems that are all as hard as each other, and problems that are solved always or never."""
    shares = [share, 1 - share] * 50
    assert between_problems(shares, 16) == expected
