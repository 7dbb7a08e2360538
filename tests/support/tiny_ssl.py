"""A tiny model of each image method, a training run of it, and a recipe that pre-trains in seconds."""

from pathlib import Path

import torch
import yaml
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
# a recipe for pretrain.py
TINY = {
    "method": "matrix_ssl", "dataset": "digits", "eval_dataset": "digits", "backbone_config": BACKBONE,
    "projector_widths": [16, 12], "predictor_widths": [6, 12], "image_size": 8, "channels": 1, "flip_prob": 0.0,
    "image_mean": [0.5], "image_std": [0.5], "per_device_train_batch_size": 64, "max_steps": 6, "learning_rate": 0.05,
    "logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "save_steps": 2,
}  # fmt: skip


def tiny_model(method: str, seed: int = 0) -> SSLModel:
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


def train(method: str, batch: int, output: str, **settings) -> SSLTrainer:
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
        tiny_model(method),
        args,
        images=load_images("digits"),
        augment=AUGMENT,
        eval_images=load_images("digits", split="test"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return trainer


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return str(path)


def views(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, 8, 8, generator=g), torch.randn(rows, 1, 8, 8, generator=g)
