"""Held-out figures on two processes (gloo), whose last batch repeats rows, are those of one."""

import json
import subprocess
import sys

import pytest

from tests.support.engines import environment, free_port
from tests.support.evaluation_run import CASES, COUNTS, evaluate
from tests.support.paths import SUPPORT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """{case: metrics} of two processes and of one."""
    folder = tmp_path_factory.mktemp("evaluation")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SUPPORT / "evaluation_run.py"), str(folder / "found.json")],
            env=environment() | shared | {"RANK": rank, "LOCAL_RANK": rank}, cwd=folder,
            stderr=(folder / f"log.{rank}").open("w"), stdout=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    codes = [process.wait(300) for process in processes]
    assert codes == [0, 0], "\n".join((folder / f"log.{rank}").read_text()[-3000:] for rank in (0, 1))
    return json.loads((folder / "found.json").read_text()), evaluate(str(folder / "alone"))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_evaluate_like_one(case, figures):
    two, one = (each[case] for each in figures)
    names = ["loss", "entropy", "mean_token_accuracy", "num_tokens", *(["ce", "mce"] if case != "dft" else [])]
    for count in COUNTS:
        for name in names:
            if case == "mixture" and name == "loss":
                continue  # holds the auxiliary loss, which depends on the batches
            assert two[f"eval_{count}_{name}"] == pytest.approx(one[f"eval_{count}_{name}"], rel=5e-6), (count, name)
