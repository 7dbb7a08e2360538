"""Files are complete or absent, and on the disk before they take their names."""

import doctest
import sys

import pytest

from matrix_llm.base import files
from matrix_llm.base.files import atomic_path, read_jsonl, write_text
from tests.support.disk import record_disk


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


@pytest.mark.skipif(sys.platform != "linux", reason="finds the path of an open file in /proc")
def test_a_text_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut leaves an empty file in the place of the old one."""
    path = tmp_path / "a.txt"
    events = record_disk(monkeypatch)
    write_text(path, ["one\n", "two\n"])
    assert path.read_text() == "one\ntwo\n"
    (temporary,) = [event[1] for event in events if event[0] == "move" and event[2] == path]
    assert events.index(("flush", temporary)) < events.index(("move", temporary, path))
