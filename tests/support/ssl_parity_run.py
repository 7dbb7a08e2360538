"""One process of tests/ssl/test_training.py's parity test: every method for a few steps, through SSLTrainer.

    [accelerate launch --num_processes 2] ssl_parity_run.py OUT BATCH

Losses and final weights go to OUT, by the first process.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import set_seed

from matrix_llm.ssl.augment import AugmentConfig
from matrix_llm.ssl.config import SSLTrainingConfig
from matrix_llm.ssl.data import load_images
from matrix_llm.ssl.methods import METHODS
from matrix_llm.ssl.modeling import SSLConfig, SSLModel
from matrix_llm.ssl.trainer import SSLTrainer

BACKBONE = {
    "model_type": "small_resnet",
    "num_channels": 1,
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "layer_type": "basic",
}
AUGMENT = AugmentConfig(
    image_size=8,
    channels=1,
    crop_scale_min=0.5,
    flip_prob=0.0,
    blur_prob=0.0,
    solarize_prob2=0.5,
    image_mean=(0.5,),
    image_std=(0.5,),
)


def tiny(method: str, seed: int = 0) -> SSLModel:
    entry = METHODS[method]
    set_seed(seed)
    return SSLModel(
        SSLConfig(
            method=method,
            backbone_config=dict(BACKBONE),
            projector_widths=[16, 12],
            predictor_widths=[6, 12] if entry.predictor else None,
            queue_size=40 if entry.queue else None,  # no multiple of the batch
            prototypes=7 if entry.prototypes else None,
            probe_classes=10,
        )
    )  # fmt: skip


def run(method: str, batch: int, output: str, **settings) -> SSLTrainer:
    given = {
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "effective_rank_steps": 0,
        "save_strategy": "no",
        **settings,
    }
    args = SSLTrainingConfig(output, per_device_train_batch_size=batch, use_cpu=True, disable_tqdm=True, **given)
    trainer = SSLTrainer(
        tiny(method),
        args,
        images=load_images("digits"),
        augment=AUGMENT,
        eval_images=load_images("digits", split="test"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


if __name__ == "__main__":
    out, batch = Path(sys.argv[1]), int(sys.argv[2])
    found = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            trainer = run(method, batch, folder)
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
    from matrix_llm.run.command import exit_process

    exit_process(0)
