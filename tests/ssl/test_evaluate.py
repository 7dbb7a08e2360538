"""The command line on the digits (evaluate.py): every protocol, and what it refuses before it loads weights."""

import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

pytest.importorskip("sklearn")

from matrix_llm.ssl.evaluate import main
from matrix_llm.ssl.modeling import SSLConfig, SSLModel
from tests.support.paths import ROOT
from tests.support.ssl_features import TRANSFORM, tiny_backbone

SCRIPT = ROOT / "matrix_llm" / "ssl" / "evaluate.py"


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    tiny_backbone().save_pretrained(folder)
    TRANSFORM.save(folder)
    (folder / "recipe.yaml").write_text("flip_prob: 0.0\n")
    return folder


def evaluated(capsys, out, *arguments):
    assert main([*map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert str(out) in printed
    return json.loads(out.read_text())


def test_every_protocol_end_to_end_on_digits(run_folder, capsys):
    common = ["--model", run_folder, "--data", "digits", "--device", "cpu"]
    place = run_folder / "eval"
    knn = evaluated(capsys, place / "knn-digits.json", "knn", *common)
    assert knn["by_k"].keys() == {"20", "200"}
    assert knn["top1"] == knn["by_k"]["20"]["top1"] > 0.5
    assert (knn["n_train"], knn["n_test"], knn["classes"]) == (1297, 500, 10)
    assert knn["top5"] > knn["top1"]
    assert knn["effective_rank_batch_size"] == 500
    lbfgs = evaluated(capsys, place / "lbfgs-digits.json", "linear", "--protocol", "lbfgs", *common)
    assert lbfgs["protocol"] == "lbfgs"
    assert lbfgs["top1_interval"][0] < lbfgs["top1"] < lbfgs["top1_interval"][1]
    few = evaluated(capsys, place / "few-5-digits.json", "few", "--draws", 4, *common)
    assert len(few["top1_each_draw"]) == 4
    assert few["n_train"] == 50
    linear = evaluated(capsys, place / "linear-digits.json", "linear", "--epochs", 2, "--batch_size", 128, *common)
    assert linear["protocol"] == "linear-sgd"  # 20 steps are no use to LARS
    assert linear["settings"]["flip_prob"] == 0.0  # from the recipe
    semi = evaluated(capsys, place / "semi-10-digits.json", "semi", "--percent", 10, "--epochs", 2, *common)
    assert semi["n_train"] == 130
    names = (place / "semi-10-digits.split.txt").read_text()
    assert len(names.splitlines()) == 130
    again = evaluated(
        capsys, place / "again.json", "semi", "--split", place / "semi-10-digits.split.txt", "--epochs", 2,
        "--out", place / "again.json", *common,
    )  # fmt: skip
    assert again["top1"] == semi["top1"]
    assert {"torch", "transformers", "scikit-learn", "python"} <= semi["versions"].keys()
    assert semi["skipped"] == {"train": [], "test": []}


def test_random_and_pixel_baselines(run_folder, capsys):
    place = run_folder / "eval"
    common = ["few", "--data", "digits", "--draws", "3", "--device", "cpu", "--model"]
    trained = evaluated(capsys, place / "few-5-digits.json", *common, run_folder)
    random = evaluated(capsys, place / "random-few-5-digits.json", *common, f"random:{run_folder}")
    other = evaluated(capsys, place / "random-few-5-digits-seed3.json", *common, f"random:{run_folder}", "--seed", 3)
    pixels = evaluated(capsys, place / "pixels-few-5-digits.json", *common, f"pixels:{run_folder}")
    assert random["top1"] == trained["top1"]  # the run is the start of seed 0
    assert other["top1"] != random["top1"]
    plain = evaluated(capsys, place / "plain.json", *common, "pixels", "--out", place / "plain.json")
    assert (
        plain["top1_each_draw"] == pixels["top1_each_draw"]
    )  # the run's size is that of the digits, and features are standardised


def test_the_backbone_of_a_whole_ssl_model_is_evaluated(run_folder, tmp_path, capsys):
    backbone = tiny_backbone()
    model = SSLModel(
        SSLConfig(method="simsiam", backbone_config=backbone.config, projector_widths=[8, 8], predictor_widths=[4, 8])
    )
    model.backbone.load_state_dict(backbone.state_dict())
    model.save_pretrained(run_folder / "pretraining")
    common = ["knn", "--data", "digits", "--device", "cpu", "--model"]
    whole = evaluated(
        capsys, run_folder / "pretraining" / "eval" / "knn-digits.json", *common, run_folder / "pretraining"
    )
    assert whole["by_k"] == evaluated(capsys, run_folder / "eval" / "knn-digits.json", *common, run_folder)["by_k"]


def flat_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "flat" / split / "a.png")
    return tmp_path / "flat"


REFUSED = {
    "no such model": (["knn", "--model", "{tmp}/none"], "is no folder"),
    "no model in it": (["knn", "--model", "{tmp}"], "has no config.json"),
    "unlabelled": (["knn", "--data", "{flat}"], "has no labels"),
    "no such data": (["knn", "--data", "./nowhere"], "does not exist"),
    "too many labels": (["few", "--labels_per_class", "500"], "labels_per_class=500, but the smallest class has"),
    "percent above 100": (["semi", "--percent", "101"], "--percent 101"),
    "percent 0": (["semi", "--percent", "0"], "--percent 0"),
    "no labels named": (["semi"], "Give --percent 1, or --split FILE"),
    "no such split": (["semi", "--split", "{tmp}/none.txt"], "cannot be read as text"),
    "k too large": (["knn", "--k", "2000"], "--k 2000"),
    "pixels in training": (["linear", "--model", "pixels"], "has no network"),
    "one draw": (["few", "--draws", "1"], "--draws 1"),
    "no such device": (["knn", "--device", "cuda:99"], "--device cuda:99"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_any_weight_is_loaded(
    case, run_folder, tmp_path, capsys, monkeypatch
):
    def too_late(*args, **kwargs):
        raise AssertionError("loaded weights before checking")

    monkeypatch.setattr("matrix_llm.ssl.evaluation.subjects.load_backbone", too_late)
    given, reason = REFUSED[case]
    arguments = [a.format(tmp=tmp_path, flat=flat_folder(tmp_path) if "{flat}" in a else "") for a in given]
    for name, value in (("--model", str(run_folder)), ("--data", "digits")):
        arguments += [] if name in arguments else [name, value]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert reason in error
    assert not list(tmp_path.rglob("*.json.tmp"))
    assert not (run_folder / "eval").exists()


def test_an_earlier_result_is_kept_unless_forced(run_folder, capsys):
    common = ["few", "--model", run_folder, "--data", "digits", "--draws", 2, "--device", "cpu"]
    out = run_folder / "eval" / "few-5-digits.json"
    first = evaluated(capsys, out, *common)
    assert main([*map(str, common), "--seed", "0"]) == 2
    assert "--force" in capsys.readouterr().err
    assert evaluated(capsys, out, *common, "--force")["top1"] == first["top1"]


def test_weights_that_are_pickles_or_damaged_are_refused(run_folder, capsys):
    arguments = ["knn", "--model", str(run_folder), "--data", "digits"]
    weights = run_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert main(arguments) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    torch.save({}, run_folder / "pytorch_model.bin")
    weights.unlink()
    assert main(arguments) == 2
    assert "no model.safetensors" in capsys.readouterr().err


def test_the_script_runs_from_elsewhere_and_leaves_the_standard_ssl_module(run_folder, tmp_path):
    """`python .../evaluate.py` puts the script's folder first on the path; `matrix_llm/ssl` must not hide `ssl`."""
    arguments = ["knn", "--model", str(run_folder), "--data", "digits", "--device", "cpu"]
    check = tmp_path / "sitecustomize.py"
    check.write_text(
        "import atexit, sys\n"
        "def seen():\n"
        "    import ssl\n"
        "    print('ssl:', hasattr(ssl, 'SSLContext'), 'matrix_llm' in ssl.__file__, file=sys.stderr)\n"
        "atexit.register(seen)\n"
    )
    out = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("knn: ")
    assert "ssl: True False" in out.stderr
    assert (run_folder / "eval" / "knn-digits.json").is_file()
