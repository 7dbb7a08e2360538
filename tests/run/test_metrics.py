"""The metrics file of a run, and its plot."""

import json

import matplotlib.image
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from matrix_llm.base.files import read_jsonl
from matrix_llm.run.metrics import MetricsFileCallback, last_values, plot_losses


@pytest.mark.parametrize(
    ("entries", "colours"),
    [
        ([], 0),
        ([{"step": 1, "ce": 2.0}, {"step": 2, "ce": 1.0}], 1),
        ([{"step": 1, "ce": 2.0, "mce": 1.0}, {"step": 2, "ce": 1.0, "mce": 0.5}], 2),
        ([{"step": 1, "eval_ce": 2.0}], 1),
    ],
)
def test_a_plot_shows_a_curve_in_its_own_colour_for_each_loss_that_was_logged(tmp_path, entries, colours):
    plot_losses(entries, tmp_path / "loss.png", title="run")
    image = matplotlib.image.imread(tmp_path / "loss.png")[..., :3]
    assert (image < 0.5).all(axis=-1).sum() > 500  # axes and labels are drawn
    blue = (image[..., 2] - image[..., 0]) > 0.5  # ce
    red = (image[..., 0] - image[..., 2]) > 0.5  # mce
    assert [blue.sum() > 20, red.sum() > 20] == [colours >= 1, colours >= 2]


def test_a_resumed_run_removes_the_lines_of_the_steps_that_it_repeats(tmp_path):
    path, callback = tmp_path / "metrics.jsonl", MetricsFileCallback()
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    state, control = TrainerState(global_step=2), TrainerControl()
    callback.on_train_begin(args, state, control)
    assert read_jsonl(path) == lines[:2]
    callback.on_log(args, state, control, logs={"loss": 1.5})
    assert read_jsonl(path) == [*lines[:2], {"step": 2, "loss": 1.5}]
    callback.on_train_begin(args, TrainerState(global_step=0), control)  # a new run
    assert read_jsonl(path) == []


def test_the_last_value_of_each_logged_name_is_found():
    entries = [{"step": 1, "ce": 2.0, "mce": 1.0}, {"step": 2, "ce": 1.5}]
    assert last_values(entries, ("ce", "mce", "eval_ce")) == {"ce": 1.5, "mce": 1.0}
