"""The command line (pretrain.py): a run from its recipe to its folder, and what it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel

from matrix_llm.ssl.modeling import load_backbone, pooled
from matrix_llm.ssl.pretrain import main
from tests.support.paths import ROOT
from tests.support.tiny_ssl import BACKBONE, write_recipe


def test_a_run_leaves_a_backbone_that_auto_model_loads_alone(tmp_path, capsys):
    plain = {**BACKBONE, "model_type": "resnet"}
    path = write_recipe(tmp_path, backbone_config=plain, image_size=32)
    run = tmp_path / "run"
    assert main([path, "--output_dir", str(run), "--eval_strategy", "steps", "--eval_steps", "3"]) == 0
    assert "Matrix-SSL" in (run / "README.md").read_text()
    whole = AutoModel.from_pretrained(run / "pretraining").eval()
    script = (
        f"import sys; from transformers import AutoModel; AutoModel.from_pretrained({str(run)!r}); "
        "assert 'matrix_llm' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    x = torch.randn(3, 1, 32, 32)
    for folder in (run, run / "pretraining", run / "checkpoint-6"):
        torch.testing.assert_close(pooled(load_backbone(folder), x), pooled(whole.backbone, x), rtol=0, atol=0)
    assert "eval_intra_class_effective_rank" in (run / "metrics.jsonl").read_text()
    assert main([path, "--output_dir", str(run)]) == 2
    assert "holds the weights of a finished run" in capsys.readouterr().err


def test_the_script_runs_from_another_folder_with_the_standard_ssl(tmp_path):
    """matrix_llm/ssl as the first folder of the path would hide the module that every HTTPS client needs."""
    script = f"""
import runpy, sys
sys.argv = ["pretrain.py", {write_recipe(tmp_path)!r}, "--dry_run"]
sys.path[0] = {str(ROOT / "matrix_llm/ssl")!r}
try:
    runpy.run_path({str(ROOT / "matrix_llm/ssl/pretrain.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
import ssl
assert ssl.SSLContext
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "steps            20 an epoch, 6 in all" in done.stdout


def test_a_diverged_run_ends_with_one_line_and_status_1(tmp_path, capsys):
    assert (
        main(
            [
                write_recipe(tmp_path, method="vicreg", predictor_widths=None, learning_rate=1.0e30),
                "--output_dir",
                str(tmp_path / "run"),
            ]
        )
        == 1
    )
    assert "which was not taken" in capsys.readouterr().err.splitlines()[-1]


def test_unreadable_images_are_skipped_named_and_counted(tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(40):
        Image.new("L", (12, 12), i * 5).save(folder / f"{i:02}.png")
    (folder / "17.png").write_bytes(b"not an image")
    path = write_recipe(
        tmp_path, dataset=str(folder), max_steps=10, per_device_train_batch_size=8, eval_dataset=None, save_steps=100
    )
    assert main([path, "--output_dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["skipped_images"] == 1
    assert "17.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gamma": 1.0}, "write it into loss_settings"),
        ({"dataset": "no/such/folder/of/images"}, "no/such/folder"),
        ({"gradient_accumulation_steps": 2}, "does not enlarge the batch"),
        ({"per_device_train_batch_size": 1298}, "Set per_device_train_batch_size lower"),
        ({"base_learning_rate": 1.0}, "Give one"),
        ({"optim": "sgd"}, "Write `optimizer: sgd`"),
        ({"method": "simsiam", "ema_momentum": 0.9}, "simsiam has no target network"),
        ({"channels": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}, "Make them equal"),
        ({"projector_widths": [16, 0]}, "one width above 0"),
        ({"backbone_config": {**BACKBONE, "depths": [1]}}, "depths and hidden_sizes equally many"),
        ({"backbone_config": {"model_type": "resnt"}}, "Did you mean .*resnet"),
        ({"method": "moco", "predictor_widths": None, "queue_size": 63}, r"queue_size=63.*at least 64"),
        ({"backbone_config": {"depths": [1]}}, "Add model_type"),
        ({"eval_strategy": "epoch", "eval_dataset": None}, "Give eval_dataset"),
        ({"dataloader_drop_last": False}, "Set it to true"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=1 .* at least 2"),
        ({"loss_settings": {"lambda_": "small"}}, "lambda_='small' must be a number"),
        ({"loss_settings": {"order": 2.5}}, "order=2.5 must be a whole number"),
    ],
)
def test_a_recipe_that_cannot_work_ends_with_one_line(tmp_path, capsys, changes, words):
    import re

    assert main([write_recipe(tmp_path, **changes), "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert re.search(words, error), error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
