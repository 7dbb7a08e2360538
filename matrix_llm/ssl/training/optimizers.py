"""SGD, LARS or AdamW over the parts of an `SSLModel`, and their learning rates over the steps."""

from __future__ import annotations

from typing import Any

from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from matrix_llm.ssl.config import SSLTrainingConfig
from matrix_llm.ssl.models.ssl_model import SSLModel
from matrix_llm.ssl.training.lars import LARS

__all__ = ["build_optimizer", "build_scheduler"]


def build_optimizer(model: SSLModel, args: SSLTrainingConfig) -> Optimizer:
    """The optimizer that the recipe names.

    SimSiam's predictor is a separate group (`fixed`: its learning rate stays constant), and so is the online probe.
    """
    # 1. The parameters with a separate group
    fixed = model.predictor if model.method.fixed_predictor_lr else None
    apart = {id(p) for part in (model.probe, fixed) if part for p in part.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    # 2. The groups
    groups: list[dict[str, Any]] = [{"params": trained}]
    if args.optimizer == "adamw":  # no decay of biases and normalisation; LARS does the same by itself
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if fixed is not None:
        groups.append({"params": [*fixed.parameters()], "fixed": True})
    if model.probe is not None:
        probe = [*model.probe.parameters()]
        groups.append({"params": probe, "lr": args.probe_learning_rate, "weight_decay": 0.0, "adapt": False})
    # 3. The optimizer
    common: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, **common)
    return (LARS if args.optimizer == "lars" else SGD)(groups, momentum=args.momentum, **common)


def build_scheduler(args: SSLTrainingConfig, optimizer: Optimizer, steps: int) -> LambdaLR:
    """The schedule that the recipe names, for all groups but those marked `fixed`."""
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )
    for index, group in enumerate(optimizer.param_groups):
        if group.get("fixed"):
            scheduler.lr_lambdas[index] = _always_one
            group["lr"] = scheduler._last_lr[index] = group["initial_lr"]  # undo the first step of the warm-up
    return scheduler


def _always_one(step: int) -> float:  # a function of the module, because a checkpoint stores it
    return 1.0
