"""Saved weights are scored by the command of eval/ in a process of its own, which never outlives the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.gsm8k import main as evaluate
from matrix_llm.base.errors import EvalError
from matrix_llm.data.prompts import PROMPT_TEMPLATES
from matrix_llm.data.wordproblems import generate
from matrix_llm.run import scoring as module
from matrix_llm.run.scoring import PROBLEMS, ScoreProcess, Scoring
from tests.support.paths import ROOT

PROBLEMS_ASKED = generate(6, seed=3)


@pytest.fixture
def scoring(tmp_path):
    made = Scoring(
        folder=tmp_path / "accuracy",
        engine="transformers",
        template=PROMPT_TEMPLATES["plain"],
        max_new_tokens=8,
        gpu_memory=0.3,
        trust_remote_code=False,
        device=torch.device("cpu"),
    )
    made.write_problems(PROBLEMS_ASKED)
    return made


@pytest.fixture
def weights(tmp_path, tiny_llama, tiny_tokenizer):
    tiny_llama(512).save_pretrained(tmp_path / "weights")
    tiny_tokenizer.save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def members_of(group):
    """The living processes of a process group."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if is_alive(path.name) and group_of(path) == group]


def group_of(process):
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[2])
    except OSError:
        return None


@pytest.mark.slow
def test_the_score_and_every_text_are_those_of_the_eval_command(scoring, weights, tmp_path):
    process = ScoreProcess(scoring, weights, scoring.folder / "step-3")
    arguments = ["--model", str(weights), "--data", str(scoring.folder / PROBLEMS), "--prompt", "plain"]
    arguments += ["--output_dir", str(tmp_path / "by_hand"), "--max_tokens", "8", "--engine", "transformers"]
    assert evaluate(arguments) == 0
    wait_for(process.is_over)
    found = process.result()
    summary = json.loads((tmp_path / "by_hand" / "gsm8k_problems.json").read_text())
    score = summary["scores"][summary["convention"]]
    assert {name: found[name] for name in ("correct", "total", "accuracy", "low", "high")}.items() <= score.items()
    assert found["total"] == len(PROBLEMS_ASKED)
    rows = [folder / "gsm8k_problems.jsonl" for folder in (scoring.folder / "step-3", tmp_path / "by_hand")]
    assert rows[0].read_bytes() == rows[1].read_bytes()


def test_the_reason_of_a_failure_is_the_commands_own_line(scoring, tmp_path):
    process = ScoreProcess(scoring, tmp_path / "nowhere", scoring.folder / "step-3")
    wait_for(process.is_over)
    with pytest.raises(EvalError, match=rf"nowhere.*no such folder\. Its log is {scoring.folder}/step-3/log\.txt\.$"):
        process.result()


def test_a_process_that_takes_too_long_is_killed_with_its_children(scoring, weights, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 2)
    sleeping = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"]
    monkeypatch.setattr(Scoring, "command", lambda *_: sleeping)
    process = ScoreProcess(scoring, weights, scoring.folder / "step-3")
    group = process._process.pid
    wait_for(lambda: len(members_of(group)) == 2)
    wait_for(process.is_over)
    with pytest.raises(EvalError, match="no result within"):
        process.result()
    wait_for(lambda: not members_of(group))


@pytest.mark.slow
def test_it_dies_with_a_run_that_is_killed(scoring, tmp_path):
    """SIGKILL leaves the run no time to do anything."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from matrix_llm.run.scoring import ScoreProcess, Scoring\n"
        "Scoring.command = lambda *_: [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        f"made = Scoring(Path({str(tmp_path)!r}), 'vllm', 'x', 1, 0.3, False, torch.device('cpu'))\n"
        "print(ScoreProcess(made, Path('x'), Path(made.folder, 'step-1'))._process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    run = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    pid = int(run.stdout.readline())
    assert is_alive(pid)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    wait_for(lambda: not is_alive(pid))


def test_the_process_is_nobodys_rank_and_uses_the_device_of_this_one(scoring, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "8", "MASTER_PORT": "1", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    here = scoring.environment()
    assert not here.keys() & {"RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_FSDP"}
    assert here["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert here["HOME"] == os.environ["HOME"]
    second = Scoring(**{**vars(scoring), "device": torch.device("cuda", 1)})
    assert second.environment()["CUDA_VISIBLE_DEVICES"] == "6"


def test_only_an_engine_in_this_machine_is_given_a_share_of_memory(scoring, tmp_path):
    own = Scoring(**{**vars(scoring), "engine": "vllm"})
    assert "--gpu_memory_utilization=0.3" in own.command(tmp_path, tmp_path)
    server = Scoring(**{**vars(scoring), "engine": "http://localhost:8000"})
    assert not [word for word in server.command(tmp_path, tmp_path) if "memory" in word]
