"""Check and consolidate checkpoints: `python -m matrix_llm.checkpoints check runs/x`. The code is in `matrix_llm/run/`."""

from matrix_llm.base.errors import CheckpointError
from matrix_llm.run.checkpoint_files import MANIFEST, finish_checkpoint, last_complete_checkpoint, main, what_is_missing

__all__ = ["MANIFEST", "CheckpointError", "finish_checkpoint", "last_complete_checkpoint", "main", "what_is_missing"]

if __name__ == "__main__":
    raise SystemExit(main())
