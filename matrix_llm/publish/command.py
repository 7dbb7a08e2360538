"""Render the model card of a finished run, or push the run to the Hub.

python -m matrix_llm.hub card runs/x                    # render runs/x/README.md again, with the scores in runs/x/eval/
python -m matrix_llm.hub push runs/x --repo user/name   # private unless --public; again: only what is missing is sent
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from matrix_llm.base.console import command_name, fail
from matrix_llm.base.errors import MatrixLLMError, PushError, scrub


class _Parser(argparse.ArgumentParser):
    """argparse quotes what it does not know: "unrecognized arguments: --tokn hf_..."."""

    def error(self, message: str) -> NoReturn:
        super().error(scrub(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=command_name("python -m matrix_llm.hub"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    card = commands.add_parser("card", help="render a run's README.md again")
    pushing = commands.add_parser("push", help="send a run to the Hub")
    for command in (card, pushing):
        command.add_argument("run", type=Path, help="output_dir of a finished run")
        command.add_argument(
            "--license", help="as the Hub spells it, e.g. apache-2.0; default: the old card's, or the base model's"
        )
        command.add_argument("--base-model", help="the base model's name on the Hub, where the recipe names a folder")
    pushing.add_argument("--repo", required=True, help="user/name")
    pushing.add_argument("--public", action="store_true", help="make a new repository public; default: private")
    pushing.add_argument("--revision", help="branch, made if it is missing; default: main")
    pushing.add_argument(
        "--token", help="default: HF_TOKEN or that of `hf auth login`, which other users of the machine cannot see"
    )
    pushing.add_argument("--keep-card", action="store_true", help="send README.md as it is in the run's folder")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2 if the run or the name cannot be used; 1 if the Hub cannot be reached or refuses."""
    options = _parser().parse_args(arguments)
    from matrix_llm.publish.card import write_card  # here: --help need not wait for transformers
    from matrix_llm.publish.destination import Destination
    from matrix_llm.publish.push import push

    try:
        if options.command == "card":
            print(f"=> {write_card(options.run, licence=options.license, base_model=options.base_model)}")
            return 0
        to = Destination(options.repo, False if options.public else None, options.revision, options.token)
        address = push(
            options.run, to, licence=options.license, base_model=options.base_model, keep_card=options.keep_card
        )
        if address:
            print(f"=> {address}")
    except (MatrixLLMError, OSError) as error:  # OSError: a file of the run that cannot be read or written
        message = scrub(str(error), getattr(options, "token", None))
        return fail(message, 1 if isinstance(error, PushError) else 2)
    return 0
