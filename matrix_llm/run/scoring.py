"""Saved weights scored by `matrix-llm eval gsm8k` in a process of its own, while training goes on.

The process is the command that anyone can run on the same folder, so its score is that command's. It has its own files
(`Scoring.folder`) and log, and it is killed when it takes too long and when this process ends, in whatever way.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import parse_json, write_text
from matrix_llm.base.processes import kill_with_this_process
from matrix_llm.data.prompts import CHAT, PROMPT_TEMPLATES
from matrix_llm.run.decode import Question

PROBLEMS = "problems.jsonl"
SCORES = "gsm8k_problems.json"  # as eval/ names the scores on a file of that name
LOG = "log.txt"
TIMEOUT = 1800.0  # seconds, the start of the engine included
LAST_LINES = 2**14  # bytes of the log that are searched for the error
# How a launcher tells a process of its rank. The scoring process is nobody's rank.
LAUNCHERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_",
    "TORCH_NCCL_", "ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "CROSS_RANK",
)  # fmt: skip
# The prompts of eval/ that ask as training does: the same text, and an end for a model that goes on to ask itself
PROMPTS = {PROMPT_TEMPLATES["metamath"]: "alpaca", PROMPT_TEMPLATES["plain"]: "plain", CHAT: "chat_question"}


@dataclass(frozen=True)
class Scoring:
    """How the weights of a run are scored."""

    folder: Path
    """Where problems, scores and logs are written; a folder of its own in the run's."""
    engine: str
    """An engine of eval/: "vllm", "transformers", or the address of a vLLM server."""
    template: str
    """The prompt of training: a text that holds {instruction} once, or "chat"."""
    max_new_tokens: int
    """Maximum length of a response, in tokens."""
    gpu_memory: float
    """Share of a GPU's memory that "vllm" may take; above 0, at most 1."""
    trust_remote_code: bool
    """Whether the Python code that came with the model may run."""
    device: torch.device
    """Of this process; the scoring process uses the same."""

    def write_problems(self, problems: Sequence[Question]) -> None:
        """The problems in the form that eval/ reads."""
        rows = [
            {"id": f"held_out/{index}", "question": problem.query, "answer": problem.answer}
            for index, problem in enumerate(problems)
        ]
        write_text(self.folder / PROBLEMS, "".join(json.dumps(row) + "\n" for row in rows))

    def command(self, weights: Path, output: Path) -> list[str]:
        """The command that scores the folder `weights`."""
        words = [sys.executable, "-m", "matrix_llm", "eval", "gsm8k", "--overwrite", "--n=1", "--temperature=0"]
        words += [f"--model={weights}", f"--data={self.folder / PROBLEMS}", f"--output_dir={output}"]
        words += [f"--prompt={PROMPTS.get(self.template, self.template)}", f"--max_tokens={self.max_new_tokens}"]
        words += [f"--engine={self.engine}"]
        if self.engine == "vllm":
            words += [f"--gpu_memory_utilization={self.gpu_memory}"]
        return words + (["--trust_remote_code"] if self.trust_remote_code else [])

    def environment(self) -> dict[str, str]:
        """This process's, without what its launcher set, for the same device."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
        paths = [str(Path(__file__).resolve().parents[2]), kept.get("PYTHONPATH", "")]
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if self.device.type == "cuda":
            index, named = self.device.index or 0, kept.get("CUDA_VISIBLE_DEVICES")
            kept["CUDA_VISIBLE_DEVICES"] = named.split(",")[index] if named else str(index)
        else:
            kept.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # training needs the cores as well
        return kept


class ScoreProcess:
    """The process that scores one folder of weights; it starts at once.

    >>> process = ScoreProcess(scoring, Path("runs/x/checkpoint-20"), Path("runs/x/scores"))  # doctest: +SKIP
    >>> while not process.is_over(): ...  # doctest: +SKIP
    >>> process.result()["accuracy"]  # doctest: +SKIP
    0.71
    """

    def __init__(self, scoring: Scoring, weights: Path, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.log = output, output / LOG
        (output / SCORES).unlink(missing_ok=True)
        command, environment = scoring.command(weights, output), scoring.environment()
        self._deadline = time.monotonic() + TIMEOUT
        self._is_late = self._is_closed = False
        if scoring.device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps for later is not free for another process
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for training, and the group can be killed with its engine
            )
        self._watcher = kill_with_this_process([-self._process.pid])  # negative: the whole group

    def is_over(self) -> bool:
        """Whether it has ended, or has taken too long and is ended now."""
        is_late = time.monotonic() > self._deadline
        if not self._is_closed and (is_late or self._process.poll() is not None):
            self._is_late = is_late and self._process.returncode is None
            self.close()  # at once: later, its number might be another's
        return self._is_closed

    def result(self) -> dict[str, Any]:
        """The scores, once it is over; see `read_scores`.

        Raises:
            EvalError: it failed or took too long; with its own last words and the path of its log.
        """
        status = self._process.wait()
        if self._is_late:
            reason = f"no result within {TIMEOUT / 60:.0f} minutes"
        elif status == 0 and (found := read_scores(self.output)) is not None:
            return found
        else:
            reason = self._last_words() or f"the process ended with exit status {status}"
        raise EvalError(f"{reason.rstrip('.')}. Its log is {self.log}.")

    def close(self) -> None:
        """Kill the process, if it still runs, with all that it started."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._watcher.kill()
        self._watcher.communicate()

    def _last_words(self) -> str | None:
        """The command's error line, or else the last line of its log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - LAST_LINES))
            lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else lines[-1] if lines else None


def read_scores(folder: Path) -> dict[str, Any] | None:
    """The score that eval/ wrote into `folder`, in the names of `Accuracy`; None if there is none that can be read."""
    try:
        summary = parse_json((folder / SCORES).read_text(encoding="utf-8"))
        score = summary["scores"][summary["convention"]]
        found = {name: score[name] for name in ("correct", "total", "accuracy", "low", "high")}
        return {**found, "unanswered": score["extraction_failures"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
