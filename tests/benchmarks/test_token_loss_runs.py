"""benchmarks/token_loss_runs.py: the table of docs/losses.md follows from its committed rows."""

import json

from benchmarks.output import markdown_table
from benchmarks.token_loss_runs import HEADER, RUNS, lines
from tests.support.paths import ROOT

ROWS = [json.loads(line) for line in (ROOT / "docs/token_loss_runs.jsonl").read_text().splitlines()]


def test_the_page_has_the_table_of_its_rows():
    assert markdown_table(HEADER, lines(ROWS)) in (ROOT / "docs/losses.md").read_text()
    assert [line[0] for line in lines(ROWS)] == [run.name for run in RUNS]


def test_first_and_last_figures_are_those_of_the_steps():
    steps = [row for row in ROWS if row["run"] == "emo" and "grad_norm" in row]
    assert len(steps) == 50
    (line,) = [line for line in lines(ROWS) if line[0] == "emo"]
    assert line[1] == f"{steps[0]['token_loss']:.3f}"
    assert line[4] == f"{sum(row['ce'] for row in steps[45:]) / 5:.3f}"
    assert line[9] == "yes"


def test_a_resumed_run_with_other_bits_is_shown():
    rows = [{**row, "resumed_to_same_bits": False} if "resumed_to_same_bits" in row else row for row in ROWS]
    assert [line[9] for line in lines(rows) if line[9]] == ["NO"] * 3
