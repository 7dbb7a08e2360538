"""The study's page, tables and plots."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from benchmarks.study.analysis import analyse
from benchmarks.study.design import StudyError
from benchmarks.study.folder import PROBLEMS, RUNS, SETUP, append_row
from benchmarks.study.plots import draw_contrasts, draw_curves
from benchmarks.study.report import BEGIN, END, render, write_report
from benchmarks.study.tables import rank_table
from matrix_llm.base.files import read_jsonl, write_text
from tests.support.paths import ROOT
from tests.support.pictures import coloured_share, count_colour
from tests.support.study import write_synthetic_study


def test_report_says_no_difference_where_there_is_none(tmp_path):
    write_synthetic_study(tmp_path, {"ce": 0, "mce": 0, "weight3": 0, "input": 0})
    write_report(tmp_path, tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    assert "No difference found between mce and ce on held-out generated problems" in page
    assert "2 contrasts: no difference found in any" in page
    assert "Held-out CE a token: no difference found" in page
    assert len((tmp_path / "results_rows.jsonl").read_text().splitlines()) == 20


def test_report_keeps_the_rest_of_the_page_and_refuses_one_without_markers(tmp_path):
    write_synthetic_study(tmp_path, {"ce": 0, "mce": 0}, seeds=2, size=50)
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    for _ in range(2):
        files = write_report(tmp_path, page)
    text = page.read_text()
    assert text.startswith("# Mine\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert all(file.is_file() for file in files)
    page.write_text("# No markers")
    with pytest.raises(StudyError, match=r"page\.md.*markers"):
        write_report(tmp_path, page)


def test_report_lists_runs_that_diverged_and_leaves_their_seed_out(tmp_path):
    write_synthetic_study(tmp_path, {"ce": 0, "mce": 0}, seeds=3, size=50)
    append_row(tmp_path / RUNS, {"arm": "mce", "seed": 4, "status": "diverged"})
    text = render(read_jsonl(tmp_path / RUNS), read_jsonl(tmp_path / PROBLEMS), "x")
    assert "non-finite: mce seed 4" in text
    assert "over 3 seeds" in text


def test_verdicts_of_a_run_that_was_killed_before_its_row_do_not_count(tmp_path):
    write_synthetic_study(tmp_path, {"ce": 0, "mce": 0}, seeds=3, size=50)
    for arm in ("ce", "mce"):
        append_row(tmp_path / PROBLEMS, {"arm": arm, "seed": 4, "set": "heldout", "correct": "1" * 50})
    text = render(read_jsonl(tmp_path / RUNS), read_jsonl(tmp_path / PROBLEMS), "x")
    assert "over 3 seeds" in text


def test_report_describes_a_study_that_differs_in_an_override(tmp_path):
    for name, gain, overrides in (("a", 0.0, []), ("b", 0.05, ["--learning_rate", "1e-3"])):
        (tmp_path / name).mkdir()
        write_synthetic_study(tmp_path / name, {"ce": 0, "mce": gain}, seeds=3)
        write_text(tmp_path / name / SETUP, json.dumps({"overrides": overrides}))
    write_report(tmp_path / "a", tmp_path / "p.md", [tmp_path / "b"])
    cells = [line.split(" | ") for line in (tmp_path / "p.md").read_text().splitlines()]
    gains = {
        c[0].removeprefix("| "): float(c[3].split()[0]) for c in cells if c[0] in ("| as above", "| learning_rate 1e-3")
    }
    assert gains["learning_rate 1e-3"] - gains["as above"] == pytest.approx(5, abs=1.5)
    assert len((tmp_path / "p_sensitivity.jsonl").read_text().splitlines()) == 6
    with pytest.raises(StudyError, match=r"--sensitivity.*c.*--output"):
        write_report(tmp_path / "a", tmp_path / "p.md", [tmp_path / "c"])


@pytest.mark.parametrize("stem", ["results", "results_100m"])
def test_the_projects_pages_are_what_their_raw_rows_say(tmp_path, stem):
    """Up to the last digit of a mean, which NumPy's versions round differently."""
    docs = ROOT / "docs"
    found = json.loads((docs / f"{stem}_setup.json").read_text())
    for name, source in ((RUNS, "rows"), (PROBLEMS, "problems")):
        (tmp_path / name).write_bytes((docs / f"{stem}_{source}.jsonl").read_bytes())
    sensitivity = {}
    for row in read_jsonl(docs / f"{stem}_sensitivity.jsonl"):
        sensitivity.setdefault(row.pop("study"), []).append(row)
    body = render(read_jsonl(tmp_path / RUNS), read_jsonl(tmp_path / PROBLEMS), stem, found["base"], sensitivity)
    page = (docs / f"{stem}.md").read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    written = page.split(BEGIN)[1].split(END)[0].split()
    again = body.split()
    assert len(written) == len(again)
    assert sum(a != b for a, b in zip(written, again, strict=True)) <= 3


def draw_study(tmp_path, gains):
    write_synthetic_study(tmp_path, gains, seeds=3, size=400)
    draw_contrasts(analyse(read_jsonl(tmp_path / PROBLEMS)), "heldout", tmp_path / "accuracy.png")
    return imread(tmp_path / "accuracy.png")


def test_a_contrast_that_differs_is_drawn_in_red_to_the_right_of_zero(tmp_path):
    picture = draw_study(tmp_path, {"ce": 0, "mce": 0.3, "weight3": 0})
    red, blue = count_colour(picture, "#d62728"), count_colour(picture, "#1f77b4")
    assert red.sum() > 50
    assert blue.sum() > 50
    assert count_colour(picture, "#f1b3b3", tolerance=0.03).sum() > 50  # the bootstrap interval, translucent
    assert np.nonzero(red)[1].min() > np.nonzero(blue)[1].max()  # the intervals do not touch


def test_every_arm_with_a_curve_is_a_line_and_an_arm_without_one_is_not(tmp_path):
    curves = {"ce": [[1, 2.0], [2, 1.0]], "mce": [[1, 3.0], [2, 1.5]], "weight0.1": []}
    rows = [{"arm": arm, "seed": 1, "curve_ce": curve} for arm, curve in curves.items()]
    draw_curves(rows, tmp_path / "drawn.png")
    drawn = imread(tmp_path / "drawn.png")
    colours = ["#1f77b4", "#ff7f0e", "#2ca02c"]  # of the first three arms
    assert [count_colour(drawn, colour).sum() > 50 for colour in colours] == [True, True, False]
    draw_curves([{"arm": "ce", "seed": 1}], tmp_path / "blank.png")
    assert coloured_share(imread(tmp_path / "blank.png")) == 0 < coloured_share(drawn)


def test_runs_without_checkpoints_have_no_column_and_no_panel_of_hidden_states(tmp_path):
    curves = {"curve_ce": [[1, 2.0]], "curve_rank_head": [[1, 9.0], [2, 5.0]]}
    rows = [{"arm": arm, "seed": 1, **curves} for arm in ("ce", "mce")]
    assert rank_table(rows).splitlines()[2] == "| ce | 9.0 (step 1) to 5.0 |"
    draw_curves(rows, tmp_path / "two.png")
    draw_curves([{**row, "curve_rank_hidden": [[2, 4.0]]} for row in rows], tmp_path / "three.png")
    widths = [imread(tmp_path / name).shape[1] for name in ("two.png", "three.png")]
    assert widths[0] < 0.8 * widths[1]
