"""The console command `matrix-llm COMMAND ...`, also `python -m matrix_llm` and `accelerate launch -m matrix_llm`.

Each command is the `main(arguments) -> int` of a module, which is imported when its command is given and gets every
other word as it stands. So `matrix-llm --help` loads no torch, and a command does what its script does, with the same
exit status.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill

from matrix_llm.base.console import fail
from matrix_llm.base.reader import SHIPPED
from matrix_llm.base.threads import wait_passively
from matrix_llm.base.values import nearest

PROGRAM = "matrix-llm"


@dataclass(frozen=True)
class Command:
    """One line of `matrix-llm --help`."""

    summary: str
    """What the command does."""
    module: str = ""
    """The module whose `main` runs; "" for a command that only has commands of its own."""
    usage: str = ""
    """What follows the command's name, where --help is printed here; "" where the module prints its own."""
    help: str = ""
    """The rest of that help."""
    first: tuple[str, ...] = ()
    """Arguments that go before the user's."""
    last: tuple[str, ...] = ()
    """Arguments that go after the user's."""
    commands: Mapping[str, "Command"] | None = None
    """Commands of its own, as in `matrix-llm eval gsm8k`."""


RECIPE_HELP = """\
RECIPE is the path of a .yaml file, or the name of a shipped recipe:

{names}

Any setting can follow as --key value, and overrides the recipe. The output goes to output_dir, by default {output}."""

LAUNCH_HELP = """

one process         {program} {name} RECIPE
several GPUs        accelerate launch -m matrix_llm {name} RECIPE
show the plan only  {program} {name} RECIPE --dry_run

Exit status: 0 done, or stopped by a signal with a checkpoint saved; 2 an error before training; 1 after it began."""

COMMANDS: dict[str, Command] = {
    "train": Command(
        "fine-tune a language model as a recipe says",
        "matrix_llm.train",
        usage="RECIPE [--key value ...] [--dry_run]",
        help=RECIPE_HELP + LAUNCH_HELP,
    ),
    "plan": Command(
        "show what `train` would do: settings, steps, memory per GPU, one row with its label mask",
        "matrix_llm.train",
        usage="RECIPE [--key value ...]",
        help=RECIPE_HELP + "\nNothing is trained, no weights are loaded and no GPU is needed.",
        last=("--dry_run",),
    ),
    "demo": Command(
        "train a small model on generated problems: five minutes on two CPU cores, nothing is downloaded",
        "matrix_llm.train",
        usage="[--key value ...]",
        help="The shipped recipe tiny. Writes runs/tiny. Any setting can follow as --key value.",
        first=(str(SHIPPED / "recipes" / "tiny.yaml"),),
    ),
    "fetch": Command("get a pretrained model, or make a plain folder of a .gguf file", "matrix_llm.fetch.command"),
    "pretrain": Command(
        "pre-train an image backbone without labels",
        "matrix_llm.ssl.pretrain",
        usage="RECIPE [--key value ...] [--dry_run]",
        help=RECIPE_HELP + LAUNCH_HELP,
    ),
    "eval": Command(
        "score a model",
        commands={
            "gsm8k": Command("GSM8K, grade-school word problems", "eval.gsm8k"),
            "math": Command("MATH, competition problems, or MATH-500", "eval.hendrycks_math"),
            "score": Command("any of the benchmarks by --task NAME: AIME, AMC, GSM-Plus and others", "eval.score"),
        },
    ),
    "compare": Command("two evaluated runs on the same problems, paired", "eval.compare"),
    "regrade": Command("grade saved responses again, under every convention", "eval.regrade"),
    "diagnose": Command("measure what MCE will do to a model, before it is trained", "matrix_llm.diagnose.command"),
    "merge": Command("merge a LoRA adapter into its base model", "matrix_llm.merge"),
    "checkpoints": Command(
        "check a run's checkpoints, or turn a sharded one into plain weights", "matrix_llm.checkpoints"
    ),
    "hub": Command("push a finished run to the Hub, or write its model card again", "matrix_llm.publish.command"),
}


# --- help ------------------------------------------------------------------------------------------------------------


def list_commands(name: str, commands: Mapping[str, Command]) -> str:
    """The help of the program, or of a command with commands of its own."""
    width = max(map(len, commands))
    lines = [f"  {word:<{width}}  {command.summary}" for word, command in commands.items()]
    return f"usage: {name} COMMAND ...\n\n" + "\n".join(lines) + f"\n\n{name} COMMAND --help says more."


def describe(name: str, command: Command) -> str:
    """The help of a command that takes a recipe."""
    own = name.removeprefix(f"{PROGRAM} ")
    folder, output = ("recipes/ssl", "runs/ssl/NAME") if own == "pretrain" else ("recipes", "runs/NAME")
    shipped = " ".join(sorted(file.stem for file in (SHIPPED / folder).glob("*.yaml")))
    names = fill(shipped, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    text = command.help.format(names=names, output=output, program=PROGRAM, name=own)
    return f"usage: {name} {command.usage}\n\n{command.summary[0].upper()}{command.summary[1:]}.\n\n{text}"


# --- the command -----------------------------------------------------------------------------------------------------


def load_main(module: str) -> Callable[[list[str]], int]:
    """The `main` of a command's module. An installed package has eval/ inside it, a checkout beside it."""
    if module.startswith("eval.") and find_spec("matrix_llm.eval"):
        module = f"matrix_llm.{module}"
    elif module.startswith("eval."):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not another `eval` in the current folder
    return import_module(module).main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status; 2 for a command that does not exist."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # 1. Which command
    name, command = PROGRAM, Command("", commands=COMMANDS)
    while command.commands:
        if not words or words[0] in ("-h", "--help"):
            print(list_commands(name, command.commands))
            return 0 if words else 2
        word = words.pop(0)
        if word not in command.commands:
            known = f" Commands: {', '.join(command.commands)}."
            return fail(f"{name}: {word!r} is not a command.{nearest(word, command.commands)}{known}", 2)
        name, command = f"{name} {word}", command.commands[word]
    # 2. Its help, where that needs no import
    if command.usage and ("-h" in words or "--help" in words or not (words or command.first)):
        print(describe(name, command))
        return 0 if words else 2
    # 3. The command itself, which finds its arguments where a script does
    wait_passively()  # before torch is imported
    given = [*command.first, *words, *command.last]
    sys.argv = [name, *given]
    return load_main(command.module)(given)


def run() -> None:
    """The entry point: run a command, and end the process as the scripts do."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = fail("aborted.", 130)
    except BrokenPipeError:  # of `| head`: nobody reads on, which needs no traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    if "matrix_llm.run.command" in sys.modules:
        from matrix_llm.run.command import exit_process

        exit_process(status)
    sys.exit(status)
