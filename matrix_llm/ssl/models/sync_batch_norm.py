"""Batch normalisation over the rows of all ranks, which `Trainer` does not set up itself.

Legend: B images of this rank, C channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["SyncBatchNorm", "synchronise_batch_norm"]


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> None:
    """Replace the batch normalisations inside `module` by ones over all ranks, in place; names and state stay the
    same.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if device.type == "cpu":
                child.__class__ = SyncBatchNorm
            else:
                setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            synchronise_batch_norm(child, device)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of all ranks, in plain collectives: PyTorch's own has no CPU version."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (B, C, ...), not {tuple(input.shape)}.")

    def forward(self, input: Tensor) -> Tensor:  # (B, C, ...)
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        # 1. Statistics over all ranks, in float32: under autocast the rows may be bfloat16.
        given, input = input.dtype, input.float()
        mean = _mean_over_ranks(input.mean(axes))  # (C,)
        centred = input - mean.view(shape)
        variance = _mean_over_ranks(centred.square().mean(axes))
        # 2. Running statistics, with the unbiased variance
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                count = input.numel() // input.shape[1] * (dist.get_world_size() if dist.is_initialized() else 1)
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / max(count - 1, 1)), momentum)
        # 3. Normalise
        out = centred * (variance + self.eps).rsqrt().view(shape)
        return (out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)).to(given)


def _mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of `x` over the ranks, with gradients. The ranks hold equally many rows, which `gather_rows` checks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x) / dist.get_world_size()
