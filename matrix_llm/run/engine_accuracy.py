"""Accuracy on held-out problems by another engine than training's: vLLM, here or on a server, during training.

At step N every process takes part in saving the weights, as for a checkpoint, into accuracy/step-N/weights. The first
process has them scored by `ScoreProcess` while training goes on, logs the result when it comes, with the step whose
weights it is of (`accuracy_step`), and removes the weights.

- One measurement at a time. If the last one still runs when the next is due, training waits for it, which is said.
- The one before training is waited for: what keeps the engine from starting stops the run there. Later failures are
  said, and training goes on.
- While the first process waits, the others exchange a flag with it every second, so that no collective times out; a
  request to stop ends the waiting.
- A run that was stopped finds the weights it had not scored yet, and the scores it had not logged yet, when it resumes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from matrix_llm.base.console import is_first_process, say
from matrix_llm.base.errors import EvalError, RecipeError
from matrix_llm.base.files import read_jsonl
from matrix_llm.base.vllm_server import VLLMServer, is_server
from matrix_llm.run.decode import Question, log_accuracy
from matrix_llm.run.failures import why_not_written
from matrix_llm.run.preemption import StopOnSignal
from matrix_llm.run.run_folder import METRICS
from matrix_llm.run.scoring import ScoreProcess, Scoring, read_scores

FOLDER = "accuracy"  # in the run's
WEIGHTS = "weights"
SAVING = ".saving"


def check_engine(engine: str) -> None:
    """Ask a server what it serves, before rows are read; any other engine is on this machine.

    A collective: the first process asks for all.

    Raises:
        RecipeError: there is none, or its weights cannot be replaced; on every process.
    """
    if not is_server(engine):
        return
    said: list[str | None] = [None]
    if is_first_process():
        try:
            described = VLLMServer(engine).describe()
            say(f"=> accuracy         by {engine}, which serves {described['model']} in {described['dtype']}")
        except EvalError as error:
            said = [str(error)]
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast_object_list(said)
    if said[0] is not None:
        raise RecipeError(f"accuracy_engine={engine!r}: {said[0]}")


class EngineAccuracy(TrainerCallback):
    """Measures accuracy before training, every `every` steps and after training.

    Args:
        trainer: a `MatrixTrainer`.
        every: optimizer steps between two measurements; 0: none during training.
        stop: what knows of a request to stop.

    Logged are `accuracy`, `accuracy_low`, `accuracy_high` and `accuracy_step`.
    """

    def __init__(
        self, trainer: Any, problems: Sequence[Question], scoring: Scoring, *, every: int, stop: StopOnSignal
    ) -> None:
        self.trainer, self.problems, self.scoring, self.every, self.stop = trainer, problems, scoring, every, stop
        self._is_first = trainer.is_world_process_zero()
        self._process: ScoreProcess | None = None  # of the first process alone
        self._step = 0  # whose weights it scores
        self._failure: str | None = None  # why there is no process, or no score

    # -- when ---------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Measure the weights that the run starts from; a run that goes on completes what its predecessor left."""
        if state.global_step == 0:
            if self._is_first:
                for earlier in self.scoring.folder.glob("step-*[0-9]"):  # of a run that saved no checkpoint
                    shutil.rmtree(earlier, ignore_errors=True)
                self.scoring.write_problems(self.problems)
            say(f"=> accuracy before training is measured by {self.scoring.engine}: {self.scoring.folder}/step-0")
            with self.trainer.pause_clock():
                self._measure(0)
                self._wait()
            self._finish(is_fatal=True)
        elif self._is_first:
            self.scoring.write_problems(self.problems)
            self._take_up(state.global_step)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._finish()
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            with self.trainer.pause_clock():
                is_free = self._wait(f"=> accuracy of step {self._step} is still being measured: training waits for it")
                self._finish()
                if is_free:  # or the run is about to stop
                    self._measure(state.global_step)

    def before_and_after(self) -> dict[str, Any]:
        """Measure the weights at the end of training, and wait for the score. A collective.

        Returns:
            `accuracy_before` and `accuracy_after`, as results.json holds them; without what could not be measured.
        """
        step = self.trainer.state.global_step
        is_free = self._wait()
        self._finish()
        if is_free:
            self._measure(step)
            is_free = self._wait()
            self._finish()
        if not is_free:
            say("=> the run was asked to stop, so its accuracy after training is not measured")
        steps = {"accuracy_before": 0, "accuracy_after": step}
        return {name: found for name, step in steps.items() if (found := read_scores(self._folder(step))) is not None}

    def close(self) -> None:
        """End the measurement that runs. Its weights stay for a run that goes on from here."""
        if self._process is not None:
            self._process.close()
            self._process = None

    # -- how ----------------------------------------------------------------------------------------------------------

    def _folder(self, step: int) -> Path:
        return self.scoring.folder / f"step-{step}"

    def _measure(self, step: int) -> None:
        """Save the weights and start to score them. A collective."""
        weights, saving = self._folder(step) / WEIGHTS, self.scoring.folder / SAVING
        if self._is_first:
            shutil.rmtree(saving, ignore_errors=True)
        try:
            self._save(saving)
        except Exception as error:
            if (reason := why_not_written(error)) is None:
                raise
            shutil.rmtree(saving, ignore_errors=True)  # of the first process, which alone writes
            self._step, self._failure = step, f"the weights cannot be saved: {reason}"
        else:
            if self._is_first:
                shutil.rmtree(weights, ignore_errors=True)
                weights.parent.mkdir(parents=True, exist_ok=True)
                saving.rename(weights)
                self._start(step)

    def _save(self, folder: Path) -> None:
        """Save the weights whole, however they are sharded, as the end of a run does."""
        trainer = self.trainer
        plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
        before = None if plugin is None else plugin.state_dict_type
        if plugin is not None:
            plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            trainer.save_model(str(folder), _internal_call=True)
        finally:
            if plugin is not None:
                plugin.set_state_dict_type(before)

    def _start(self, step: int) -> None:
        self._step = step
        try:
            self._process = ScoreProcess(self.scoring, self._folder(step) / WEIGHTS, self._folder(step))
        except OSError as error:  # no memory for another process, or no room for its log
            self._failure = f"the process that measures it cannot be started: {error.strerror}"

    def _wait(self, words: str = "") -> bool:
        """Wait until no measurement runs, or the run is asked to stop. A collective.

        Args:
            words: said where that takes longer than a moment.

        Returns:
            Whether no measurement runs.
        """
        started, is_said = time.monotonic(), not words
        while True:
            is_busy = self._process is not None and not self._process.is_over()
            is_busy, is_asked = self._any_process([is_busy, self.stop.is_asked])
            if not is_busy or is_asked:
                return not is_busy
            if not is_said and time.monotonic() > started + 2:
                say(words)
                is_said = True
            time.sleep(0.2 if time.monotonic() < started + 10 else 1)

    def _any_process(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether it is set on any process."""
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return flags
        tensor = torch.tensor(flags, dtype=torch.float32, device=self.trainer.args.device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return [bool(flag) for flag in tensor.tolist()]

    def _finish(self, *, is_fatal: bool = False) -> None:
        """Log what was measured, or say why nothing was; a measurement that still runs is left alone.

        Raises:
            RecipeError: it failed, and `is_fatal`; on every process.
        """
        if self._process is not None and self._process.is_over():
            process, self._process = self._process, None
            try:
                self._log(self._step, process.result())
            except EvalError as error:
                self._failure = str(error)
            shutil.rmtree(self._folder(self._step) / WEIGHTS, ignore_errors=True)
        failure, self._failure = self._failure, None
        if is_fatal and self._any_process([failure is not None])[0]:
            raise RecipeError(
                f"accuracy_engine={self.scoring.engine!r} could not measure accuracy before training: {failure} "
                "Correct that, or set accuracy_engine to transformers."
            )
        if failure is not None:
            say(f"=> accuracy of step {self._step} could not be measured: {failure}")

    def _log(self, step: int, found: dict[str, Any]) -> None:
        say(
            f"=> accuracy of step {step}: {100 * found['accuracy']:.1f} % of {found['total']} held-out problems "
            f"(95 % interval {100 * found['low']:.1f} to {100 * found['high']:.1f})"
        )
        log_accuracy(self.trainer, found, accuracy_step=step)  # by this process alone: no collective in it

    def _take_up(self, reached: int) -> None:
        """In the first process of a resumed run: log scores that the checkpoint knows nothing of, and score what an
        interrupted measurement left; weights of steps that will be repeated are removed.
        """
        shutil.rmtree(self.scoring.folder / SAVING, ignore_errors=True)
        entries = read_jsonl(Path(str(self.trainer.args.output_dir)) / METRICS)
        logged = {entry["accuracy_step"] for entry in entries if "accuracy_step" in entry}
        found = {int(path.name.removeprefix("step-")): path for path in self.scoring.folder.glob("step-*[0-9]")}
        for step, folder in sorted(found.items()):
            if step > reached:
                shutil.rmtree(folder, ignore_errors=True)
            elif (scores := read_scores(folder)) is not None:
                shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
                if step not in logged:
                    self._log(step, scores)
            elif (folder / WEIGHTS).is_dir() and self._process is None:
                self._start(step)
