"""What is said below the table: intervals by template, and a warning where an interval is wide."""

import numpy as np
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
    alike = template_score(summary_of([1.0, 0.0] * 500), rows)  # half of each is solved: they are 100 draws each
    assert alike["high"] - alike["low"] < 0.3
    assert template_score(summary, [{"id": str(index), "sample": 0} for index in range(1000)]) is None
    _, note, warning = precision_notes(summary | {"templates": found})
    assert "1,000 problems are made from 10 templates" in note
    assert "23.7 to 76.3" in note
    assert "templates would make it 5, and there are 10" in warning


def test_a_wide_interval_is_warned_of_with_what_would_narrow_it():
    _, note = precision_notes(summary_of([1.0, 0.0, 0.0] * 10))
    assert note.startswith("warning: the 95 % interval is 32.0 points wide")
    assert "never beyond what 30 problems allow" in note
    wanted = int(note.split("about ")[1].split(" ")[0].replace(",", ""))
    low, high = wilson_interval(round(wanted / 3), wanted)
    assert abs(high - low - 0.05) < 0.0005  # as many problems do have an interval of 5 points
    _, note = precision_notes(summary_of([0.0] * 3, samples=2))
    assert "about 73 problems" in note
    assert "would narrow it to 56.1 at best" in note  # nothing shows that the samples differ
    assert not precision_notes(summary_of([1.0, 0.0] * 800))
    assert not precision_notes(summary_of([0.0] * 100 + [1.0] * 1219))


def test_more_samples_narrow_an_interval_as_far_as_is_said():
    """Problems of difficulty 0.3 and 0.7, sampled 4 times, against 400 times."""
    random = np.random.default_rng(0)
    few, many = (
        [random.binomial(samples, chance) / samples for chance in [0.3, 0.7] * 200] for samples in (4, 400)
    )  # fmt: skip
    _, note = precision_notes(summary_of(few, samples=4))
    promised = float(note.split("narrow it to ")[1].split(" ")[0])
    reached = score([[Verdict(index < round(share * 400), "1") for index in range(400)] for share in many])
    assert abs(promised - 100 * (reached["high"] - reached["low"])) < 0.5


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.0), (0.0, 1.0)])
def test_what_no_number_of_samples_removes(share, expected):
    """Problems that are all as hard as each other, and problems that are solved always or never."""
    shares = [share, 1 - share] * 50
    assert between_problems(shares, 16) == expected
