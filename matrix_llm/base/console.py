"""What a command prints: progress on stdout, and one line on stderr for an error that the user can correct."""

import os
import sys

from matrix_llm.base.secrets import scrub
from matrix_llm.base.text import visible


def is_first_process() -> bool:
    """True in process 0 of a distributed run, and in a run without a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def command_name(otherwise: str) -> str:
    """The command as the user typed it: "matrix-llm compare" (see matrix_llm/cli.py), else `otherwise`."""
    return sys.argv[0] if sys.argv[0].startswith("matrix-llm ") else otherwise


def say(text: str) -> None:
    """Print on the first process only, without secrets and control characters, which data may hold."""
    if is_first_process():
        print(visible(scrub(text)), flush=True)


def fail(message: str, status: int) -> int:
    """Print `error: message` on stderr as one line, and return `status` for the caller to exit with.

    It shows no token, and no control character that data or a file name brought in.

    >>> sys.exit(fail("max_steps='ten' is not a number.", 2))  # doctest: +SKIP
    """
    line = " ".join(filter(None, (each.strip() for each in scrub(message).splitlines())))
    print(f"error: {visible(line)}", file=sys.stderr, flush=True)
    return status
