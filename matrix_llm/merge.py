"""Merge a LoRA adapter into its base model: a plain folder that transformers and vLLM load without PEFT.

python -m matrix_llm.merge runs/x merged                     # in the base model's dtype
python -m matrix_llm.merge user/adapter merged --dtype float32 --base-model models/base
"""

import argparse
from pathlib import Path

from matrix_llm.base.console import command_name, fail, say
from matrix_llm.base.errors import MatrixLLMError

DTYPES = ["float32", "bfloat16", "float16"]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0; 2, with one line on stderr, for an adapter that cannot be merged."""
    parser = argparse.ArgumentParser(
        prog=command_name("python -m matrix_llm.merge"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="output_dir of a LoRA run, a folder with an adapter, or its name on the Hub")
    parser.add_argument("out", type=Path, help="a new folder, which from_pretrained can then read")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged weights; default: the base model's")
    parser.add_argument("--base-model", help="folder or name on the Hub, instead of the one that the adapter names")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that came with the base model")
    options = parser.parse_args(arguments)
    from matrix_llm.publish.merge import merge  # here: --help needs no torch

    try:
        line = merge(
            options.run,
            options.out,
            dtype=options.dtype,
            base_model=options.base_model,
            trust_remote_code=options.trust_remote_code,
        )
    except (MatrixLLMError, OSError) as error:  # OSError: a file of the adapter that cannot be read
        return fail(str(error), 2)
    say(f"=> {options.out}/: {line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
