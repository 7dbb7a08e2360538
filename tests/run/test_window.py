"""The logging window (run/window.py): sums, their way through a checkpoint, and the clock of training."""

import doctest

import pytest
import torch
from accelerate import Accelerator

from matrix_llm.run import window
from matrix_llm.run.window import TokenClock, TokenSums


def test_doctests():
    found = doctest.testmod(window)
    assert found.attempted
    assert not found.failed


def test_taking_the_sums_empties_the_window():
    accelerator, sums = Accelerator(cpu=True), TokenSums()
    assert sums.take(accelerator) == {}
    for ce in (2.0, 6.0):
        sums.add(tokens=torch.tensor(4), ce=torch.tensor(ce, requires_grad=True))
    assert sums.take(accelerator) == {"ce": 8.0, "tokens": 8.0}
    assert sums.take(accelerator) == {}


def test_restored_sums_go_on_where_they_were():
    """In float64: a float32 sum of many tokens would no longer grow by one."""
    first, second = TokenSums(), TokenSums()
    first.add(tokens=torch.tensor(2**24))
    second.restore(first.state(), torch.device("cpu"))
    for sums in (first, second):
        sums.add(tokens=torch.tensor(1))
    assert first.state() == second.state() == {"tokens": 2**24 + 1}


def test_the_clock_leaves_out_what_is_not_training_and_what_was_read_before(monkeypatch):
    times = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr(window.time, "perf_counter", lambda: next(times))
    clock = TokenClock(100)
    clock.exclude(5.0)
    assert clock.read(600) == pytest.approx(100)  # 500 tokens in the 10 s of which 5 were training
    assert clock.read(640) == pytest.approx(20)
