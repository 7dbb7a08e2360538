"""Check the checkpoints of a run, or turn a sharded one into plain weights.

python -m matrix_llm.checkpoints check runs/x                            # which are complete, what the others lack
python -m matrix_llm.checkpoints consolidate runs/x/checkpoint-20 OUT    # ZeRO or FSDP2 shards to plain safetensors
"""

import argparse
from pathlib import Path

from matrix_llm.base.console import command_name, fail, say
from matrix_llm.base.errors import CheckpointError
from matrix_llm.run.checkpoint_files import (
    MANIFEST,
    find_checkpoints,
    finish_checkpoint,
    last_complete_checkpoint,
    what_is_missing,
)

__all__ = ["MANIFEST", "CheckpointError", "finish_checkpoint", "last_complete_checkpoint", "main", "what_is_missing"]


def print_check(run: Path) -> int:
    """Print the state of each checkpoint of `run`. Returns 0 if one is complete, 1 if none is."""
    checkpoints = find_checkpoints(run).values()
    if not checkpoints:
        raise CheckpointError(f"{run} holds no checkpoint-N. Give the output_dir of a run that saves checkpoints.")
    missing = {checkpoint: what_is_missing(checkpoint) for checkpoint in checkpoints}
    for checkpoint, reason in missing.items():
        say(f"{checkpoint}: {'complete' if reason is None else f'INCOMPLETE, {reason}'}")
    return 0 if None in missing.values() else 1


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 1 if `check` finds no complete checkpoint; 2, with one line on stderr, for an error."""
    parser = argparse.ArgumentParser(
        prog=command_name("python -m matrix_llm.checkpoints"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="say which checkpoints of a run are complete, and what the others lack")
    check.add_argument("run", type=Path, help="output_dir of a run")
    consolidating = commands.add_parser("consolidate", help="write plain safetensors of a ZeRO or FSDP2 checkpoint")
    consolidating.add_argument("checkpoint", type=Path, help="a checkpoint's folder, such as runs/x/checkpoint-20")
    consolidating.add_argument("out", type=Path, help="a new folder, which from_pretrained can then read")
    options = parser.parse_args(arguments)
    try:
        if options.command == "check":
            return print_check(options.run)
        from matrix_llm.run.consolidate import consolidate  # here: `check` needs no torch

        consolidate(options.checkpoint, options.out)
    except CheckpointError as error:
        return fail(str(error), 2)
    say(f"=> {options.out}/ holds plain weights for from_pretrained")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
