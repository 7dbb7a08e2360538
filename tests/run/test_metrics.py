"""Files that are whole or absent, and the metrics file."""

import doctest

import pytest

from matrix_llm.base import files
from matrix_llm.base.files import atomic_path, read_jsonl, write_text
from matrix_llm.run.metrics import plot_losses


def test_doctests():
    assert doctest.testmod(files).failed == 0


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_cut_off_metrics_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1, "loss": 2.0}]
    assert read_jsonl(tmp_path / "none") == []


def test_a_plot_needs_no_mce_and_no_entries(tmp_path):
    for entries in ([], [{"step": 1, "ce": 2.0}], [{"step": 1, "ce": 2.0, "mce": 1.0}, {"step": 1, "eval_ce": 2.0}]):
        plot_losses(entries, tmp_path / "p.png", title="t")
        assert (tmp_path / "p.png").stat().st_size > 1000
