"""Any of the benchmarks by its name: GSM8K, MATH, AIME, AMC, OlympiadBench, GSM-Plus, GSM-Symbolic.

    python eval/score.py --task aime24 --model runs/my_model                       # problems from the Hub
    python eval/score.py --task aime24 --model runs/my_model --data aime.jsonl     # from a file
    python eval/score.py --task amc23 --model runs/my_model --data ORG/NAME:train  # from another data set

eval/gsm8k.py and eval/hendrycks_math.py are this command with --task gsm8k and --task math.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "eval"

from collections.abc import Sequence

from .generate.run import main as run


def main(arguments: Sequence[str] | None = None) -> int:
    return run(None, "Score a model: generate once, grade by every convention, save everything.", arguments)


if __name__ == "__main__":
    sys.exit(main())
