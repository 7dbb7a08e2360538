"""MATH: 5,000 competition problems of seven subjects and five levels; or MATH-500, a subset in common use.

    python eval/hendrycks_math.py --model runs/my_model                       # test set from the Hub
    python eval/hendrycks_math.py --model runs/my_model --subset math500
    python eval/hendrycks_math.py --model runs/my_model --data test.jsonl     # from a file

Not called math.py because that would shadow the standard library's math module.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "eval"

from collections.abc import Sequence

from .generate.run import main as run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("math", "Score a model on MATH: generate once, grade by every convention, save everything.", arguments)


if __name__ == "__main__":
    sys.exit(main())
