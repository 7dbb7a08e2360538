"""The command of the controlled study. Its code is the package benchmarks/study; read its __init__.py first."""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.study.command import main

if __name__ == "__main__":
    sys.exit(main())
