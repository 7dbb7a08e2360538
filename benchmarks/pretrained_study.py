"""The command of the study of a pretrained model. Its code is the package benchmarks/pretrained_study."""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.pretrained_study.command import main

if __name__ == "__main__":
    sys.exit(main())
