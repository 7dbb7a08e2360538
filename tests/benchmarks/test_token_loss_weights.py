"""benchmarks/token_loss_weights.py: the figure and the table of docs/losses.md."""

import subprocess
import sys

import pytest
import torch
from matplotlib.image import imread

from benchmarks.token_loss_weights import LOSSES, gradient_weights, table
from tests.support.paths import ROOT
from tests.support.pictures import count_colour


def test_the_weights_are_those_of_the_formulas():
    p = torch.tensor([0.01, 0.29, 0.31, 0.9], dtype=torch.float64)
    expected = {
        "ce": torch.ones(4, dtype=torch.float64),
        "focal, gamma 2": (1 - p) ** 2 - 2 * p * (1 - p) * p.log(),
        "power, alpha 0.5": p**0.5,
        "dft, minus_p": p,
        "power, alpha 8": p**8,
        "threshold, logp, p >= 0.3": (p >= 0.3).double(),
        "threshold, p, p <= 0.3": p * (p <= 0.3),
    }
    for name, (loss, settings, _) in LOSSES.items():
        torch.testing.assert_close(gradient_weights(p, loss, settings), expected[name])


def test_the_page_has_the_table_as_it_is_computed():
    assert table() in (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")


@pytest.mark.slow  # a process of its own
def test_the_command_draws_every_line(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "token_loss_weights.py"), "--out", str(tmp_path / "w.png")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert table() in done.stdout
    picture = imread(tmp_path / "w.png")
    for colour in {line[:-1].rstrip("-") for _, _, line in LOSSES.values()}:
        assert count_colour(picture, colour).sum() > 100, colour
