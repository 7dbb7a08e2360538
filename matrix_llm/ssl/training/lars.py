"""LARS: SGD that scales the step of each layer to the size of its weights, for batches of thousands of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from matrix_llm.base.errors import RecipeError

__all__ = ["LARS"]


class LARS(Optimizer):
    """v <- m v + r (g + w p); p <- p - lr v, with the trust ratio r = c |p| / |g + w p|: You et al. 2017 (arXiv
    1708.03888), eq. 6.

    As in the public code of SimCLR, Barlow Twins and VICReg, parameters with at most one dimension (biases,
    normalisation) get neither the ratio nor weight decay, and r is 1 where either norm is 0.

    Args:
        params: tensors, or groups; `adapt: False` in a group (default True) makes it plain SGD with momentum.
        lr: per step, the global learning rate.
        momentum: m, at least 0.
        weight_decay: w, at least 0.
        trust_coefficient: c, at least 0; 0.001 in the public codes.

    Raises:
        RecipeError: a negative setting.

    >>> p = torch.nn.Parameter(torch.eye(2))
    >>> p.grad = torch.eye(2)
    >>> LARS([p], lr=1.0).step()  # moves by 0.001 of its own length
    >>> round(p[0, 0].item(), 4)
    0.999
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        for name, value in defaults.items():
            if value < 0:
                raise RecipeError(f"{name}={value} would step uphill. Give a number of at least 0.")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                # 1. Decay and the trust ratio, for matrices and convolutions
                if p.ndim > 1 and group["adapt"]:
                    update = update.add(p, alpha=group["weight_decay"])
                    size, change = torch.linalg.vector_norm(p), torch.linalg.vector_norm(update)
                    ratio = torch.where((size > 0) & (change > 0), group["trust_coefficient"] * size / change, 1.0)
                    update = update * ratio
                # 2. Momentum, and the step
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * state["momentum_buffer"])
        return loss
