"""Commands and tests let OpenMP threads wait passively before torch is loaded, and respect the user's own choice."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

WATCH = """
import importlib, os, runpy, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("policy when torch is imported:", os.environ.get("OMP_WAIT_POLICY"))

sys.meta_path.insert(0, Watch())
place = sys.argv.pop(1)
if place.endswith(".py"):
    sys.argv = [place, "--help"]
    sys.path[0] = os.path.dirname(place)
    runpy.run_path(place, run_name="__main__")
else:
    importlib.import_module(place)
"""
PLACES = ["matrix_llm/train.py", "matrix_llm/ssl/pretrain.py", "matrix_llm/ssl/evaluate.py", "tests.conftest"]


@pytest.mark.slow
@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("active", "active")])
@pytest.mark.parametrize("place", PLACES)
def test_the_wait_policy_is_set_before_torch_is_imported(place, given, policy, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | {"PYTHONPATH": str(ROOT)}
    if given is not None:
        env["OMP_WAIT_POLICY"] = given
    place = str(ROOT / place) if place.endswith(".py") else place
    command = [sys.executable, "-c", WATCH, place]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("policy")]
    assert found[:1] == [f"policy when torch is imported: {policy}"], done.stdout
