"""What is built from the repository: complete, without a top-level `eval`, and of use in an empty folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from importlib.util import find_spec

import pytest

from tests.support.paths import ROOT

INSIDE = {"matrix_llm": "matrix_llm", **{name: f"matrix_llm/{name}" for name in ("eval", "recipes", "ds_configs")}}
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist')"
SMALL = ["--builtin_rows", "64", "--builtin_eval_rows", "4", "--accuracy_rows", "4", "--accuracy_max_new_tokens", "4"]

pytestmark = pytest.mark.slow


def run(*words, cwd, **environment):
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist, which is built from a copy: no network, and nothing of an earlier build."""
    if not find_spec("pip") or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs pip, and setuptools 77 or newer")
    copy = tmp_path_factory.mktemp("copy")
    for name in INSIDE:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run(sys.executable, "-c", BUILD, cwd=copy)
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", "dist"]
    run(*pip, sdist, cwd=copy)
    return next((copy / "dist").glob("*.whl"))


def test_the_wheel_holds_every_file_and_the_licence(wheel):
    expected = set()
    for folder, place in INSIDE.items():
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        expected |= {f"{place}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert names == expected
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        assert any(name.endswith("/setup.py") for name in archive.getnames())


def test_an_installed_wheel_trains_plans_and_evaluates_in_an_empty_folder(wheel, tmp_path):
    # 1. Installed where nothing else is, with no checkout on the path
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site]
    run(*pip, wheel, cwd=empty)
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"bin", "matrix_llm"}
    command, here = site / "bin" / "matrix-llm", {"cwd": empty, "PYTHONPATH": str(site)}
    # 2. The commands
    plan = run(command, "plan", "tiny", *SMALL, "--deepspeed", "ds_configs/zero3.json", **here)
    assert str(site / "matrix_llm" / "recipes" / "tiny.yaml") in plan
    assert "ZeRO-3" in plan
    assert list(empty.iterdir()) == []
    run(command, "train", "recipes/tiny.yaml", "--max_steps", "2", *SMALL, **here)
    small = ["--data", "builtin", "--limit", "2", "--max_tokens", "4", "--engine", "transformers"]
    run(command, "eval", "gsm8k", "--model", "runs/tiny", *small, **here)
    scores = empty / "runs/tiny/eval/gsm8k_builtin.json"
    assert "2 problems" in run(command, "compare", scores, scores, **here)
    assert "metamath" in run(command, "regrade", scores.with_suffix(".jsonl"), "--benchmark", "gsm8k", **here)
    for words in (["hub", "push"], ["checkpoints"], ["pretrain"], ["demo"], ["eval", "math"]):
        assert f"usage: matrix-llm {' '.join(words)}" in run(command, *words, "--help", **here)
    # 3. Cards and reports have their templates
    assert (scores.with_suffix(".html")).is_file()
    assert "matrix" in (empty / "runs/tiny/README.md").read_text(encoding="utf-8")
