"""A `transformers.Trainer` whose checkpoints are complete or absent: checkpoint_files.py put to work."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from transformers import Trainer

from matrix_llm.base.errors import CheckpointError, ModelError, RecipeError, one_line
from matrix_llm.base.weights import check_adapter
from matrix_llm.run.checkpoint_files import (
    SAVING,
    finish_checkpoint,
    last_sound_checkpoint,
    remove_checkpoint,
    remove_old_checkpoints,
)
from matrix_llm.run.failures import cannot_write, why_not_written
from matrix_llm.run.pickles import check_indexes, tensors_only


@contextmanager
def _reading(checkpoint: str | None) -> Iterator[None]:
    """Turns what a damaged or hostile checkpoint raises into one line."""
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except (pickle.UnpicklingError, EOFError, RuntimeError, SafetensorError, CheckpointException) as error:
        reason = one_line(error)[:300]
        raise CheckpointError(f"{checkpoint} cannot be read: {reason}. Resume from another checkpoint.") from error


class AtomicCheckpoints(Trainer):
    """A mix-in that goes before another trainer: `class MatrixTrainer(AtomicCheckpoints, SFTTrainer)`.

    Saving and resuming are Trainer's own. This class has them write into a temporary folder, which takes the
    checkpoint's name when it is complete.
    """

    _saving = False
    """True while Trainer saves: its files then go to the temporary folder, and it must not push them."""
    _resumed_from: str | None = None
    """The checkpoint that `train` resumed from."""

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, SAVING)) if self._saving else folder

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's own, written into a temporary folder that takes the checkpoint's name when it is complete.

        Raises:
            CheckpointError: this process or another could not write its share. Nothing of the checkpoint stays.
        """
        output = Path(self._get_output_dir(trial))
        final = output / f"checkpoint-{self.state.global_step}"
        staged = output / SAVING / final.name
        self._saving = True
        try:
            # 1. an empty temporary folder, before any process writes into it
            if self.args.should_save:
                shutil.rmtree(staged.parent, ignore_errors=True)
                staged.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            # 2. every process writes its share
            super()._save_checkpoint(model, trial)
            self._save_window(staged)
            if self.args.should_save:
                self._add_missing_files(staged, final)
            self.accelerator.wait_for_everyone()
            # 3. the manifest, and the checkpoint's name
            if self.args.should_save:
                finish_checkpoint(staged, final, processes=self.args.world_size)
                staged.parent.rmdir()
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            if reason := why_not_written(error):
                with suppress(OSError):
                    remove_checkpoint(staged.parent)  # it may be what fills the disk
                raise cannot_write(final, reason, output) from error
            if not staged.exists():  # removed by the line above, in a process that failed while this one was writing
                raise CheckpointError(f"{final} was abandoned: another process could not write its share.") from error
            raise
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()  # no process continues before the checkpoint exists
        # 4. what Trainer does with a saved checkpoint
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))
        self._remove_old()

    def _remove_old(self) -> None:
        if self.args.should_save:
            output = Path(str(self.args.output_dir))
            remove_old_checkpoints(output, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:  # a checkpoint that is still being written is about to move
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_window(self, folder: Path) -> None:
        """For subclasses: save the part of this process's state that Trainer does not save."""

    def _add_missing_files(self, staged: Path, final: Path) -> None:
        """In the first process: correct the path of the best checkpoint, which Trainer stores in trainer_state.json.

        Subclasses add the files that Trainer leaves out.
        """
        # If this checkpoint is the best, Trainer has noted the temporary folder
        if self.state.best_model_checkpoint and Path(self.state.best_model_checkpoint).parent.name == SAVING:
            self.state.best_model_checkpoint = str(final)
        # If an earlier one is, Trainer has looked for it in the temporary folder, where it is not
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self.state.save_to_json(str(staged / "trainer_state.json"))

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # resumed from the checkpoint of the last step: Trainer would train one step too many
            self.control.should_training_stop = True

    # A checkpoint may be somebody else's: none of its pickles may run code, whichever engine reads them

    def _load_from_checkpoint(self, *args, **kwargs) -> None:
        with _reading(args[0]), tensors_only():
            super()._load_from_checkpoint(*args, **kwargs)

        model = self.accelerator.unwrap_model(self.model)
        folder = Path(args[0])
        if is_peft_model(model) and any(folder.glob("adapter_model.*")):
            try:
                check_adapter(model, folder, str(folder))
            except ModelError as error:
                raise CheckpointError(str(error)) from None

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise where Trainer warns: the weights that a checkpoint lacks would be those that the run started from.

        Raises:
            CheckpointError: it lacks a weight, or holds one that is not the model's.
        """
        model: Any = self.model
        state = model.state_dict()
        missing = set(load_result.missing_keys)
        loaded = {value.data_ptr() for name, value in state.items() if name not in missing}
        lost = sorted(name for name in missing if name not in state or state[name].data_ptr() not in loaded)  # not tied
        if wrong := [*lost, *sorted(load_result.unexpected_keys)]:
            what = "lacks" if lost else "holds, for another model,"
            raise CheckpointError(f"{self._resumed_from} {what} {wrong[0]}. Resume from another checkpoint.")
        if missing:
            model.tie_weights()

    def _load_optimizer_and_scheduler(self, *args, **kwargs) -> None:
        with _reading(args[0]), tensors_only():
            super()._load_optimizer_and_scheduler(*args, **kwargs)

    def _load_rng_state(self, *args, **kwargs) -> None:
        with _reading(args[0]), tensors_only():
            super()._load_rng_state(*args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trainer's own; with True it resumes from the last complete checkpoint.

        Raises:
            RecipeError: True was given, and there is no complete checkpoint.
        """
        if resume_from_checkpoint is True:
            last = last_sound_checkpoint(Path(str(self.args.output_dir)))
            if last is None:
                raise RecipeError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir} holds no complete checkpoint of this "
                    "trainer. Leave it out to start from the beginning, or give the path of another trainer's."
                )
            resume_from_checkpoint = str(last)
        self._resumed_from = resume_from_checkpoint or None
        if self._resumed_from:
            check_indexes(Path(self._resumed_from))
        # DeepSpeed's own loader is called in the midst of Trainer's train; the others are overridden below
        guard = tensors_only() if self._resumed_from and self.is_deepspeed_enabled else nullcontext()
        with guard:
            output = super().train(resume_from_checkpoint or None, *args, **kwargs)
        self._remove_old()  # a kill right after the last checkpoint leaves one too many, and no later save removes it
        return output
