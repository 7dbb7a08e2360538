"""benchmarks/lm_head: its reference against the exact solver, its rows stored once, its tables and plots."""

import json

import torch
from matplotlib.image import imread

from benchmarks.lm_head import store
from benchmarks.lm_head.accuracy import find_truth, solver_errors
from benchmarks.lm_head.inputs import Shape, make_inputs
from benchmarks.lm_head.names import EAGER, OURS, PRODUCTS
from benchmarks.lm_head.plots import draw
from benchmarks.lm_head.tables import markdown
from tests.support.paths import ROOT
from tests.support.pictures import count_colour

TINY = Shape(64, 32, 300, "float32", "cpu")


def test_the_reference_is_the_exact_solver_and_the_whole_vocabulary_comes_near_it():
    inputs = make_inputs(TINY, seed=0)
    true = find_truth(inputs, positions=6, exact_positions=3)
    assert max(true.check) < 1e-6
    errors = [solver_errors(inputs, true, {"top_k": TINY.v, "steps": steps}) for steps in (2, 6)]
    assert errors[1]["value"] < 0.1 * errors[0]["value"]
    assert errors[1]["gradient"] < 0.02


def test_labels_are_drawn_from_predictions_of_the_wanted_entropy():
    hidden, weight, labels = (t.detach() for t in make_inputs(Shape(512, 64, 500, "float32", "cpu"), seed=1))
    log_q = (hidden @ weight.T).log_softmax(-1)
    ce = torch.nn.functional.nll_loss(log_q, labels).item()
    assert abs(ce - 1.0) < 0.25


def test_a_row_is_measured_once_and_again_when_the_loss_has_changed(tmp_path, monkeypatch, capsys):
    made = []

    def measure():
        made.append(1)
        return {"extra": 2**20, "inputs": 2**20}

    about = {"kind": "memory", "name": "tiny", "shape": [1, 1, 1, "float32", "cpu"], "implementation": OURS}
    for _ in range(2):
        store.Store(tmp_path / "rows.json").get(about, measure)
    assert len(made) == 1
    monkeypatch.setattr(store, "loss_code_digest", lambda: "other code")
    store.Store(tmp_path / "rows.json").get(about, measure)
    assert len(made) == 2
    assert "1 MiB extra, 2 MiB with inputs" in capsys.readouterr().out


def test_the_performance_pages_gpu_tables_are_what_the_raw_rows_say():
    page = (ROOT / "docs" / "performance.md").read_text().splitlines()
    made = markdown([json.loads((ROOT / "docs" / "lm_head_gpu.json").read_text())]).splitlines()
    tables = [line for line in made if line.startswith("| ") and "not measured | 1." not in line]
    assert len(tables) > 25
    assert [line for line in tables if line not in page] == []


def test_the_plot_of_cost_has_a_line_for_every_implementation(tmp_path):
    names = [PRODUCTS, OURS, EAGER]
    rows = {}
    for n in (256, 512):
        about = {"name": "tiny", "shape": [n, 32, 300, "float32", "cpu"]}
        seconds = {name: [n * (place + 1.0)] for place, name in enumerate(names)}
        rows[f"{n}"] = {"kind": "sweep N, time", **about, "seconds": seconds}
        for place, name in enumerate(names):
            memory = {"implementation": name, "extra": n * 2**20 * (place + 1), "inputs": 2**20}
            rows[f"{n} {name}"] = {"kind": "sweep N, memory", **about, **memory}
    assert draw([{"rows": rows}], tmp_path) == [tmp_path / "lm_head_cost.png"]
    picture = imread(tmp_path / "lm_head_cost.png")
    halves = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 :]
    for half in halves:  # ours is red, the third takes the third colour
        assert count_colour(half, "#d62728").sum() > 100
        assert count_colour(half, "#2ca02c").sum() > 100
    assert draw([{"rows": {}}], tmp_path) == []
