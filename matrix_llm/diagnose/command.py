"""Measure what matrix cross-entropy will do to a model, before it is trained.

matrix-llm diagnose RECIPE [--key value ...]           # a recipe's model, rows, template and loss
matrix-llm diagnose RUN [ROWS] [--key value ...]       # the model in a run's folder, with the settings of its recipe
matrix-llm diagnose MODEL ROWS [--key value ...]       # a folder or a Hub id; rows as `dataset` of a recipe takes them

Any setting of a recipe can follow, e.g. --prompt_template chat or --mce_top_k 32. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryFile

from matrix_llm.base.console import command_name, fail, say
from matrix_llm.base.errors import MatrixLLMError
from matrix_llm.base.files import write_text
from matrix_llm.base.threads import wait_passively

PAGE = "diagnosis.html"
ASKED = 480


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=command_name("python -m matrix_llm diagnose"),
        usage=f"{command_name('python -m matrix_llm diagnose')} RECIPE | RUN [ROWS] | MODEL ROWS "
        "[--positions N] [--out FOLDER] [--key value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--positions",
        metavar="N",
        type=int,
        default=ASKED,
        help="trained positions to measure, at least 2; default: %(default)s",
    )
    parser.add_argument(
        "--out",
        "--output_dir",  # as the other commands call it
        metavar="FOLDER",
        type=Path,
        help=f"for diagnosis.json and {PAGE}; a run's own folder puts it on its card",
    )
    return parser


def _why_not_writable(folder: Path) -> str | None:
    """Why no file can be written there, before anything is measured; None if it can."""
    place = folder.absolute()
    place = next(each for each in (place, *place.parents) if each.exists())
    if not place.is_dir():
        return "is a file" if place == folder.absolute() else f"is inside {str(place)!r}, which is a file"
    try:
        with TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"cannot be written: {error.strerror}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2, with one line on stderr, for what cannot be measured."""
    wait_passively()  # before torch is imported
    words = list(arguments or [])
    named = []
    while words and not words[0].startswith("-"):
        named.append(words.pop(0))
    parser = _parser()
    options, overrides = parser.parse_known_args(words)
    if not 1 <= len(named) <= 2:
        parser.error("give a recipe, a run, or a model and its rows, before any --key.")
    if options.positions < 2:
        parser.error(f"--positions={options.positions} must be at least 2.")
    if options.out is not None and (reason := _why_not_writable(options.out)):
        return fail(f"--out={str(options.out)!r} {reason}. Give a folder where you may write.", 2)
    from matrix_llm.diagnose.diagnosis import diagnose  # here: --help needs no torch
    from matrix_llm.diagnose.page import render_page
    from matrix_llm.diagnose.subject import find_subject
    from matrix_llm.diagnose.text import render
    from matrix_llm.run.run_folder import DIAGNOSIS

    try:
        subject = find_subject(named[0], named[1] if len(named) == 2 else None, overrides)
        figures = diagnose(subject, options.positions, say)
        say(f"\n{render(figures)}")
        if options.out is not None:
            write_text(
                options.out / DIAGNOSIS, json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            )
            write_text(options.out / PAGE, render_page(figures))
            say(f"\n=> {options.out / DIAGNOSIS}, {options.out / PAGE}")
    except (MatrixLLMError, OSError) as error:  # OSError: a file that cannot be read or written
        return fail(str(error), 2)
    return 0
