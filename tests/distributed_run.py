"""Run by tests/test_distributed.py under `accelerate launch`: a few steps of MatrixTrainer, then loss curve and weights to disk."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_trainer import config, rows, tiny_model

from matrix_llm.config import MatrixConfig
from matrix_llm.model import train_tokenizer
from matrix_llm.trainer import MatrixTrainer


def main(out: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    name = settings.pop("architecture")
    trainer = MatrixTrainer(
        tiny_model(name),
        MatrixConfig(**config(out, **settings)),
        train_dataset=rows(16),
        processing_class=train_tokenizer(["a b"], 260),
    )
    trainer.train()
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, on rank 0, whatever shards it
    if trainer.is_world_process_zero():
        kept = {k.removeprefix("module."): v.detach().float().cpu().clone().contiguous() for k, v in state.items()}
        save_file(kept, out / "weights.safetensors")
        (out / "history.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.wait_for_everyone()  # a rank that leaves first can abort the other inside gloo
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort the interpreter's shutdown ("terminate called without an active exception")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
