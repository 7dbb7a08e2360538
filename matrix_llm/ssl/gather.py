"""The features of all ranks, with gradients: a loss over a covariance is not a mean of the losses over its parts.

    target, online = gather_rows(target, online)
    loss = matrix_ssl_loss(target, online)  # on every rank the same number: that of the whole batch
    loss.backward()  # DistributedDataParallel averages the parameters' gradients, as always

Who multiplies by the number of ranks W: the backward of `gather_rows`, and nobody else. Each rank's copy of the loss depends on
this rank's rows, so the derivative of the copies' sum is what reaches a row: W times that of the loss. The mean over ranks in
DistributedDataParallel divides by W. So W ranks with B / W rows each give the loss and the gradients of one rank with B rows,
at the same learning rate. A plain `all_gather` that puts one's own rows back reaches a row from one copy alone: W times too small.

Gradient accumulation does not enlarge the covariance: each micro-batch is a batch of its own to these losses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["gather_rows"]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows, group=group)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.clone(
            memory_format=torch.contiguous_format
        )  # all_reduce writes into it, and autograd may still need `grad`
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def gather_rows(*rows: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """The rows of all ranks, in the order of ranks; the gradient of a row is the sum over the ranks' losses.

    Args:
        rows: (B, ...) tensors, of one shape and dtype on every rank. Every rank has to call this, forward and backward.
        group: the process group; None is the default one.

    Returns:
        As many (W B, ...) tensors; the inputs themselves in a single process, where torch.distributed is not in use.

    Raises:
        ValueError: on every rank alike, if the ranks hold different shapes. Without the check all_gather would hang.

    >>> z = torch.eye(2)
    >>> gather_rows(z)[0] is z  # one process: nothing to gather
    True
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return rows
    sizes = [torch.tensor([x.ndim, x.numel(), *x.shape[:1]], device=x.device).flatten()[:3] for x in rows if x.ndim]
    if len(sizes) != len(rows):
        raise ValueError("gather_rows gathers along the first dimension, but a tensor has none.")
    mine = torch.cat(sizes)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    if not bool((torch.stack(everyone) == mine).all()):  # one wait for the device, not one for each rank
        held = [x[2::3].tolist() for x in everyone]
        raise ValueError(
            f"the ranks hold different numbers of rows ({held}, a list for each rank) or widths, but the whole batch is the ranks' equal "
            "parts. Set `drop_last=True` in the loader, or a batch size that the number of ranks divides."
        )
    return tuple(_GatherRows.apply(x.contiguous(), group) for x in rows)
