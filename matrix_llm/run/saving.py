"""Trainers whose checkpoints are whole or absent: `checkpoints.py` inside a `transformers.Trainer`."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import Trainer

from matrix_llm.base.errors import CheckpointError
from matrix_llm.run.checkpoint_files import (
    SAVING,
    finish_checkpoint,
    last_complete_checkpoint,
    not_written,
    remove_old_checkpoints,
    why_not_written,
)


class WholeCheckpoints(Trainer):
    """Put before another trainer: `class MatrixTrainer(WholeCheckpoints, SFTTrainer)`."""

    _saving = False
    _resumed_from: str | None = None

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, SAVING)) if self._saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        """The trainer's own, written into a temporary folder that takes the checkpoint's name once it is whole."""
        output = Path(self._get_output_dir(trial))
        final = output / f"checkpoint-{self.state.global_step}"
        staged = output / SAVING / final.name
        self._saving = True
        try:
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self._keep_window(staged)
            if self.args.should_save:
                self._complete(staged, final)
            self.accelerator.wait_for_everyone()  # every process has written its part
            if self.args.should_save:
                finish_checkpoint(staged, final, processes=self.args.world_size)
                staged.parent.rmdir()
        except BaseException as error:  # torch.distributed.checkpoint raises a BaseException
            reason = why_not_written(error)
            if reason is None:
                raise
            shutil.rmtree(staged.parent, ignore_errors=True)  # it may be what fills the disk
            raise not_written(final, reason, output) from error
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()  # nobody goes on from a checkpoint that is not there yet
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))
        self._remove_old()

    def _remove_old(self) -> None:
        if self.args.should_save:
            output = Path(str(self.args.output_dir))
            remove_old_checkpoints(output, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # while it is being written, it is about to move
            super()._push_from_checkpoint(checkpoint_folder)

    def _keep_window(self, folder: Path) -> None:
        """For subclasses: this process's part of the state that Trainer does not keep."""

    def _complete(self, staged: Path, final: Path) -> None:
        """By the first process: the one path that Trainer writes into the checkpoint, and what a subclass adds."""
        if self.state.best_model_checkpoint and Path(self.state.best_model_checkpoint).parent.name == SAVING:
            self.state.best_model_checkpoint = str(final)
        if (
            self.state.best_global_step
            and (best := final.with_name(f"checkpoint-{self.state.best_global_step}")).is_dir()
        ):
            self.state.best_model_checkpoint = str(best)
        self.state.save_to_json(str(staged / "trainer_state.json"))

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed from the checkpoint of the last step: Trainer would train one more
            self.control.should_training_stop = True

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(Path(str(self.args.output_dir))) or "") or None
            if resume_from_checkpoint is None:
                raise CheckpointError(
                    f"no whole checkpoint in {self.args.output_dir}. Leave resume_from_checkpoint out to start anew."
                )
        self._resumed_from = resume_from_checkpoint or None
        output = super().train(resume_from_checkpoint or None, *args, **kwargs)
        self._remove_old()  # a kill just after the last checkpoint leaves one too many, and no later save removes it
        return output
