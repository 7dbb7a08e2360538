"""One process of tests/ssl/test_trainer.py's parity test: every method for a few steps, through SSLTrainer.

    [accelerate launch --num_processes 2] ssl_parity_run.py OUT BATCH

Losses and final weights go to OUT, by the first process.
"""

import sys
import tempfile
from pathlib import Path

import torch

from matrix_llm.run.command import exit_process
from matrix_llm.ssl.methods import METHODS
from tests.support.tiny_ssl import train

if __name__ == "__main__":
    out, batch = Path(sys.argv[1]), int(sys.argv[2])
    found = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            trainer = train(method, batch, folder)
            losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            held_out = trainer.evaluate()
            found[method] = {
                "losses": torch.tensor(losses),
                "held_out": torch.tensor([held_out["eval_feature_effective_rank"], held_out["eval_rows"]]),
                "state": {name: x.clone() for name, x in trainer.ssl_model.state_dict().items()},
            }
    if trainer.is_world_process_zero():
        torch.save(found, out)
    trainer.accelerator.wait_for_everyone()
    exit_process(0)
