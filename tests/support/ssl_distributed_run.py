"""One process of tests/ssl/test_losses.py's distributed test: every loss on this rank's rows, through
DistributedDataParallel.

    python ssl_distributed_run.py RANK WORLD STORE OUT

Also imported by the test, which runs `gradients` on the whole batch in its own process.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

from matrix_llm.ssl.losses import (
    barlow_twins_loss,
    byol_loss,
    matrix_ssl_loss,
    mec_loss,
    moco_loss,
    nt_xent_loss,
    simsiam_loss,
    swav_loss,
    vicreg_loss,
)
from matrix_llm.ssl.losses.gather import gather_rows

ROWS, INPUTS, WIDTH = 12, 5, 8
QUEUE = torch.randn(9, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LOSSES = {  # of the two views' features
    "matrix_ssl official": matrix_ssl_loss,
    "matrix_ssl paper": lambda z1, z2: matrix_ssl_loss(z1, z2, preset="paper", lambda_=0.1),
    "mec": mec_loss,
    "barlow_twins": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "nt_xent": nt_xent_loss,
    "moco": lambda z1, z2: moco_loss(z1, z2, QUEUE),
    "byol": byol_loss,
    "simsiam": lambda z1, z2: simsiam_loss(z1, z2, z1, z2),
    "swav": lambda z1, z2: swav_loss(F.normalize(z1, dim=1), F.normalize(z2, dim=1)),
}


def own_rows_kept(*views):
    """The mistake that `gather_rows` avoids: other ranks' rows without a gradient."""
    gathered = []
    for z in views:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z.detach())
        parts[dist.get_rank()] = z
        gathered.append(torch.cat(parts))
    return gathered


def images() -> torch.Tensor:
    return torch.randn(2, ROWS, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(
    wrap=lambda model: model, gather=gather_rows, rows=slice(None)
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each loss, its value and the gradient of a small network's weight."""
    found = {}
    for name, loss in LOSSES.items():
        torch.manual_seed(0)
        model = wrap(torch.nn.Linear(INPUTS, WIDTH, bias=False).double())
        z1, z2 = model(images()[:, rows].flatten(0, 1)).tanh().chunk(2)
        value = loss(*gather(z1, z2))
        value.backward()
        found[name] = (value.detach(), next(model.parameters()).grad.clone())
    return found


def refusal(rank: int) -> str:
    try:
        gather_rows(torch.zeros(2 + rank, 3))
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    ddp = torch.nn.parallel.DistributedDataParallel
    found = {
        "gathered": gradients(ddp, rows=rows),
        "own rows kept": gradients(ddp, own_rows_kept, rows),
        "refusal": refusal(rank),
    }
    dist.barrier()
    torch.save(found, f"{out}/{rank}.pt")
    # 1 in 40 ordinary exits aborts after the results are saved: "terminate called without an active exception", from
    # gloo's threads
    os._exit(0)


if __name__ == "__main__":
    main()
