"""The command that measures the LM head and its loss. Its code is the package benchmarks/lm_head."""

import sys
from pathlib import Path

if not __package__:  # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.lm_head.command import main

if __name__ == "__main__":
    sys.exit(main())
