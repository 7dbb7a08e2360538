"""Evaluates held-out rows with MatrixTrainer in every case below, on however many processes the environment says.

python tests/support/evaluation_run.py OUT.json
"""

import json
import os
import sys
import tempfile
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from matrix_llm.config import MatrixConfig
from matrix_llm.model.tokenizer import train_tokenizer
from matrix_llm.trainer import MatrixTrainer
from tests.support.tiny import config, rows, tiny_model

# The last batch of two processes repeats rows: 5 rows in batches of 2 leave one, and of one row the second has none.
CASES = {
    "plain": {"mce_weight": 0.0},
    "matrix": {},
    "dft": {"mce_weight": 0.0, "loss_type": "dft"},
    "packed": {"packing": True, "max_length": 48, "per_device_eval_batch_size": 1},
    "padding-free": {"padding_free": True, "max_length": None},
    "mixture": {"architecture": "mixtral"},
    "streamed": {},
}
COUNTS = (1, 5, 11)


def evaluate(path: str) -> dict[str, dict[str, float]]:
    """{case: metrics}; those of the set of 5 rows are eval_5_loss, eval_5_ce and so on."""
    torch.set_num_threads(1)
    tokenizer, found = train_tokenizer(["a b"], 260), {}
    for case, changes in CASES.items():
        settings = {"per_device_eval_batch_size": 2, **changes}
        model = tiny_model(settings.pop("architecture", "llama"))
        held_out = {str(count): rows(count, seed=3, longest=40) for count in COUNTS}
        train_rows = rows()
        if case == "streamed":
            train_rows = train_rows.to_iterable_dataset()
            held_out = {name: data.to_iterable_dataset() for name, data in held_out.items()}
        trainer = MatrixTrainer(
            model,
            MatrixConfig(**config(path, **settings)),
            train_dataset=train_rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
        )
        found[case] = trainer.evaluate()
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate(folder)
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1]).write_text(json.dumps(result))
    os._exit(0)  # gloo's threads sometimes abort the interpreter's shutdown
