"""SSLTrainer (training/trainer.py): two ranks give the numbers of one, and a resumed run those of an unbroken one."""

import os
import subprocess
import sys

import pytest
import torch

from matrix_llm.base.errors import NonFiniteLossError
from matrix_llm.ssl.config import SSLTrainingConfig
from matrix_llm.ssl.data import load_images
from matrix_llm.ssl.methods import METHODS
from matrix_llm.ssl.trainer import SSLTrainer
from tests.support.paths import ROOT, SUPPORT
from tests.support.tiny_ssl import AUGMENT, tiny_model, train


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    """Each method for four steps: one process with 16 images a step, two (gloo) with 8 each."""
    folder = tmp_path_factory.mktemp("parity")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(SUPPORT / "ssl_parity_run.py")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
    ]
    commands = {
        1: [sys.executable, script, str(folder / "1.pt"), "16"],
        2: [*launch, script, str(folder / "2.pt"), "8"],
    }
    for command in commands.values():
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{n}.pt", weights_only=True) for n in commands]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_match_one_in_losses_and_every_weight(parity, method):
    one, two = (found[method] for found in parity)
    assert len(one["losses"]) == 4
    torch.testing.assert_close(two["losses"], one["losses"], rtol=5e-6, atol=2e-6)
    torch.testing.assert_close(two["held_out"], one["held_out"], rtol=1e-4, atol=1e-4)
    for name, value in one["state"].items():
        torch.testing.assert_close(
            two["state"][name], value, rtol=1e-5, atol=5e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("method", ["matrix_ssl", "moco"])
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(tmp_path, method):
    whole = train(method, 32, str(tmp_path / "whole"), max_steps=50)
    train(method, 32, str(tmp_path / "cut"), max_steps=50, save_strategy="steps", save_steps=45)
    resumed = train(method, 32, str(tmp_path / "cut"), max_steps=50, resume_from_checkpoint=True)
    assert resumed.state.global_step == 50
    assert resumed.state.log_history[-2]["step"] == 50
    for name, value in whole.ssl_model.state_dict().items():
        assert torch.equal(resumed.ssl_model.state_dict()[name], value), name


def test_training_moves_the_loss_down_and_the_probe_learns(tmp_path):
    settings = {"learning_rate": 0.5, "probe_learning_rate": 1.0, "logging_steps": 10, "effective_rank_steps": 20}
    trainer = train("matrix_ssl", 128, str(tmp_path), max_steps=100, **settings)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert rows[-1]["online_probe_accuracy"] > rows[0]["online_probe_accuracy"] + 0.08
    ranked = [row for row in rows if "effective_rank" in row]
    assert [row["step"] for row in ranked] == [20, 40, 60, 80, 100]
    assert all(1 < row["effective_rank"] < 12 and row["effective_rank_rows"] == 128 for row in ranked)
    found = trainer.evaluate()
    assert found["eval_rows"] == 500
    assert found["eval_online_probe_accuracy"] > 0.25
    assert found["eval_inter_class_effective_rank"] < 9 + 1e-3  # K - 1


def test_effective_ranks_are_logged_with_the_first_row_after_each_so_many_steps(tmp_path):
    trainer = train("vicreg", 64, str(tmp_path), max_steps=20, effective_rank_steps=4, logging_steps=5)
    assert [row["step"] for row in trainer.state.log_history if "effective_rank" in row] == [5, 10, 15, 20]


def test_a_loss_that_is_no_number_stops_the_run_before_the_step(tmp_path):
    with pytest.raises(
        NonFiniteLossError,
        match=r"at step \d+, which was not taken: (z1 holds NaN|the loss is).*Lower base_learning_rate",
    ):
        train("vicreg", 64, str(tmp_path), max_steps=6, learning_rate=1e30)


def test_unknown_labels_are_refused_before_training(tmp_path):
    images = load_images("digits")
    images.labels = images.labels.clone()
    images.labels[::3] = -1
    args = SSLTrainingConfig(str(tmp_path), per_device_train_batch_size=8, use_cpu=True)
    with pytest.raises(ValueError, match="has the label -1"):
        SSLTrainer(tiny_model("byol"), args, images=images, augment=AUGMENT)


def test_an_unlabelled_probe_is_refused_before_training(tmp_path):
    images = load_images("digits")
    images.labels = None
    args = SSLTrainingConfig(str(tmp_path), per_device_train_batch_size=8, use_cpu=True)
    with pytest.raises(ValueError, match="has no labels, which the online probe needs"):
        SSLTrainer(tiny_model("byol"), args, images=images, augment=AUGMENT)
