"""GSM8K: 1,319 grade-school word problems.

python eval/gsm8k.py --model runs/my_model                         # test set from the Hub
python eval/gsm8k.py --model runs/my_model --data test.jsonl       # from a file
python eval/gsm8k.py --model runs/tiny --data builtin              # generated problems, no download
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "eval"

from collections.abc import Sequence

from .generate.run import main as run


def main(arguments: Sequence[str] | None = None) -> int:
    return run("gsm8k", "Score a model on GSM8K: generate once, grade by every convention, save everything.", arguments)


if __name__ == "__main__":
    sys.exit(main())
