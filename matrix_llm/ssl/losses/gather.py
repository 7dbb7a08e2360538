"""Gather the rows of all ranks with their gradients: a loss over a covariance is not the mean of the losses over
parts of the batch.

    target, online = gather_rows(target, online)
    loss = matrix_ssl_loss(target, online)  # the same number on every rank: the loss of the full batch
    loss.backward()  # DistributedDataParallel averages the parameters' gradients, as always

Only the backward of `gather_rows` multiplies by the number of ranks W. Every rank's copy of the loss depends on this
rank's rows, so a row receives the derivative of the sum of the copies, W times that of the loss.
DistributedDataParallel then divides by W when it averages over ranks. So W ranks with B / W rows each give the loss
and the gradients of one rank with B rows, at the same learning rate. A plain `all_gather` that puts the rank's own
rows back passes the gradient of one copy alone, which is W times too small.

Gradient accumulation does not enlarge the covariance: to these losses, each micro-batch is a separate batch.
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
        # A copy, because all_reduce writes into it and autograd may still need `grad`.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def gather_rows(*rows: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, ...]:
    """The rows of all ranks, in the order of the ranks; a row's gradient is the sum over all ranks' losses.

    Args:
        rows: (B, ...) tensors, of the same shape and dtype on every rank. Every rank must call this, and run its
            backward.
        group: the process group; None is the default one.

    Returns:
        As many (W B, ...) tensors; the inputs themselves in a single process.

    Raises:
        ValueError: on every rank, if the ranks hold different shapes. Without this check all_gather would hang.

    >>> z = torch.eye(2)
    >>> gather_rows(z)[0] is z  # one process: nothing to gather
    True
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return rows
    # 1. Compare the shapes of all ranks.
    sizes = [torch.tensor([x.ndim, x.numel(), *x.shape[:1]], device=x.device).flatten()[:3] for x in rows if x.ndim]
    if len(sizes) != len(rows):
        raise ValueError("gather_rows gathers along the first dimension, but a tensor has none.")
    mine = torch.cat(sizes)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    if not bool((torch.stack(everyone) == mine).all()):
        held = [x[2::3].tolist() for x in everyone]
        raise ValueError(
            f"the ranks hold different numbers of rows ({held}, one list for each rank) or widths, but must hold "
            "equal parts of the batch. Set drop_last=True in the loader, or a batch size that the number of ranks "
            "divides."
        )
    # 2. Gather.
    return tuple(_GatherRows.apply(x.contiguous(), group) for x in rows)
