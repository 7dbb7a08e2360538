"""The command line of a training script: one `main` for matrix_llm/train.py and matrix_llm/ssl/pretrain.py.

Exit status:
- 0: the run is finished, was stopped by a signal with a checkpoint saved, or --dry_run printed its plan
- 2: an error that the user can correct, before training began
- 1: the same, after training began
- 130: Ctrl-C, without a checkpoint

Either error is one line on stderr. Any other exception is a bug: it passes through, with its own traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import torch
from transformers import TrainingArguments, set_seed

from matrix_llm.base.console import fail, is_first_process, say
from matrix_llm.base.errors import NonFiniteLossError
from matrix_llm.base.files import write_text
from matrix_llm.run.failures import explain_failure
from matrix_llm.run.lock import one_run_at_a_time
from matrix_llm.run.preemption import StopOnSignal, stop_on_signals
from matrix_llm.run.run_folder import NON_FINITE, check_output_dir, check_writable


class RunRecipe(Protocol):
    """What recipes for language models and for images have in common."""

    @property
    def training(self) -> TrainingArguments: ...
    @property
    def resolved(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=RunRecipe)


@dataclass(frozen=True)
class Command(Generic[R]):
    """The parts of a training command that differ between scripts, in the order in which `run_command` calls them."""

    usage: str
    """Printed by --help."""
    load_recipe: Callable[..., R]
    """(path, overrides, dry_run=...) -> the checked recipe."""
    find_destination: Callable[..., Any]
    """(recipe, ask=...) -> where on the Hub the finished run goes, or None. It asks the Hub only if `ask`."""
    remove_push_settings: Callable[[R], None]
    """Removes push_to_hub and the token from the recipe: Trainer must not push, and no file may hold the token."""
    print_plan: Callable[[R], None]
    """What --dry_run prints."""
    train: Callable[[R, StopOnSignal, list[str]], None]
    """(recipe, stop, arguments): the run, from its data to its final files."""
    push: Callable[[Path, Any], str]
    """(output directory, destination) -> the address of the pushed run."""


def run_command(command: Command[R], arguments: Sequence[str] | None = None) -> int:
    """Run a training script with `arguments` (by default those of the process), and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    dry_run = any(word in ("--dry_run", "--dry-run") for word in given)
    given = [word for word in given if word not in ("--dry_run", "--dry-run")]
    if not given or given[0] in ("-h", "--help"):
        print(command.usage)
        return 0 if given else 2

    output: Path | None = None
    stop: StopOnSignal | None = None
    try:
        # 1. the recipe, and whether the Hub would take the run; nothing has been loaded yet
        recipe = command.load_recipe(given[0], given[1:], dry_run=dry_run)
        output = Path(str(recipe.training.output_dir))
        destination = command.find_destination(recipe, ask=not dry_run)
        command.remove_push_settings(recipe)
        # 2. --dry_run ends here
        if dry_run:
            command.print_plan(recipe)
            return 0
        # 3. the run
        check_writable(output)
        with one_run_at_a_time(recipe.training):
            check_output_dir(recipe.training, recipe.resolved)
            set_seed(recipe.training.seed)
            with stop_on_signals() as stop:
                command.train(recipe, stop, given)
        # 4. the Hub: pushed here, where no other process waits at a barrier that could time out
        if destination is not None and not stop.stopped:
            say(f"=> {command.push(output, destination)}")
    except KeyboardInterrupt:
        return fail("aborted, without saving a checkpoint.", 130)
    except Exception as error:
        message = explain_failure(error, output)
        if message is None:
            raise
        return _report(error, message, output, has_begun=stop is not None and stop.training_has_begun)
    return 0


def _report(error: Exception, message: str, output: Path | None, *, has_begun: bool) -> int:
    """Print `message` once for all processes that raised `error`, and leave a note if the loss diverged."""
    # Before training, and for a non-finite loss, all processes raise the same error: the first one prints it.
    # Other errors during training are raised by one process alone, which must print it.
    is_shared = not has_begun or isinstance(error, NonFiniteLossError)
    status = 1 if has_begun else 2
    if is_first_process() or not is_shared:
        fail(message, status)
    if isinstance(error, NonFiniteLossError) and output is not None and is_first_process():
        with suppress(OSError):  # a full disk must not hide the line above
            write_text(output / NON_FINITE, f"{error}\n")
    return status


def exit_process(status: int) -> NoReturn:
    """Exit with `status`; immediately, where the interpreter's shutdown does harm in a run of several processes.

    On CPUs, gloo's threads sometimes abort it ("terminate called without an active exception") after everything has
    been written. After a failure, shutdown can wait for processes that are waiting for this one.
    """
    is_one_of_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_one_of_several and (status != 0 or not torch.cuda.is_available()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
