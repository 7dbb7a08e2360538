"""What the self-supervised losses cost, forward and backward, compared with the released code's arithmetic and lightly.

    python benchmarks/ssl_loss.py [--dim 2048] [--batches 1024 4096] [--repeats 5] [--threads 2] [--json table.json]

Each pair takes the same rows in turns, ours first in even repeats and last in odd ones; the first call of each is
warm-up. Printed: median and range in milliseconds, the ratio of the medians, and how far value and gradient are apart.

"released" is the arithmetic of the authors' code, rewritten here: a B x B centring matrix, dense d x d matrices for P
and Q, the Taylor series as a chain of products. The target branch has no gradient, as in training. lightly (pip
install lightly) is compared if it is installed: its VICReg, and its Barlow Twins at the same lambda.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import importlib
import importlib.util
import json
import statistics
import time
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from matrix_llm.ssl.losses import barlow_twins_loss, matrix_ssl_loss, mec_loss, vicreg_loss

Loss = Callable[[Tensor, Tensor], Tensor]


def chain_log(q: Tensor, order: int = 4) -> Tensor:
    """The Taylor series of log Q about I, a product for every order, the last one unused, as released."""
    x = q - torch.eye(len(q)).to(q)
    power, total = x, torch.zeros_like(x)
    for k in range(1, order + 1):
        total = total + power * (1.0 / k) if k % 2 else total - power * (1.0 / k)
        power = power @ x
    return total


def released_term(p: Tensor, z: Tensor, cross: bool, mu: float = 1.0, lambda_: float = 1.0) -> Tensor:
    """-tr(P log Q) of uniformity (cross) or alignment."""
    p, z = F.normalize(p), F.normalize(z)
    rows, width = z.shape
    centring = (torch.eye(rows) - (torch.ones(rows, 1) @ torch.ones(1, rows)) / rows).to(z)
    eye = torch.eye(width).to(z)
    left = lambda_ * eye if cross else (p.T @ centring @ p) / rows + mu * eye
    right = ((p if cross else z).T @ centring @ z) / rows + mu * eye
    return torch.trace(-left @ chain_log(right))


def released_matrix_ssl(target: Tensor, online: Tensor) -> Tensor:
    return released_term(target, online, True) + released_term(target, online, False)


def released_mec(z1: Tensor, z2: Tensor, eps: float = 64.0, order: int = 4) -> Tensor:
    rows, width = z1.shape
    inverse = rows * eps / width
    c = F.normalize(z1) @ F.normalize(z2).T / inverse
    power, total = c, torch.zeros_like(c)
    for k in range(1, order + 1):
        if k > 1:
            power = power @ c
        total += power / k if k % 2 else -power / k
    return -torch.trace(total) / rows * inverse


def lightly_losses() -> tuple[Loss, Loss] | str:
    """Its VICReg and Barlow Twins losses, or why there are none."""
    spec = importlib.util.find_spec("lightly")
    if spec is None or not spec.submodule_search_locations:
        return "lightly is not installed (pip install lightly)"
    try:
        for part in ("", ".loss"):  # its packages' own __init__ imports torchvision, which these two files do not need
            name, package = "lightly" + part, types.ModuleType("lightly" + part)
            package.__path__ = [str(Path(spec.submodule_search_locations[0], *part.split(".")[1:]))]
            sys.modules[name] = package
        vicreg = importlib.import_module("lightly.loss.vicreg_loss").VICRegLoss()
        barlow = importlib.import_module("lightly.loss.barlow_twins_loss").BarlowTwinsLoss(lambda_param=0.0051)
    except Exception as error:
        return f"lightly does not import: {error}"
    return vicreg, barlow


def views(rows: int, width: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Features with a decaying spectrum, the second view a noisy copy of the first."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1) ** -0.5
    first = torch.randn(rows, width, generator=generator) * scale
    second = first + 0.3 * torch.randn(rows, width, generator=generator) * scale
    return first.to(device, dtype), second.to(device, dtype)


def run(loss: Loss, z1: Tensor, z2: Tensor, both: bool) -> tuple[float, float, Tensor]:
    """Milliseconds of forward and backward, the value, and the gradient in the second view."""
    z1, z2 = z1.clone().requires_grad_(both), z2.clone().requires_grad_()
    if z1.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = loss(z1, z2)
    value.backward()
    if z1.is_cuda:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start), value.item(), z2.grad


def compare(name: str, ours: Loss, theirs: Loss, z: tuple[Tensor, Tensor], both: bool, repeats: int) -> dict:
    sides = {"ours": ours, "theirs": theirs}
    found = {side: run(loss, *z, both) for side, loss in sides.items()}
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(repeats):
        for side in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            spent[side].append(run(sides[side], *z, both)[0])
    (_, value, gradient), (_, other_value, other_gradient) = found["ours"], found["theirs"]
    row = {
        "case": name,
        "rows": len(z[0]),
        "width": z[0].shape[1],
        "ours_ms": spent["ours"],
        "theirs_ms": spent["theirs"],
        "ratio": statistics.median(spent["ours"]) / statistics.median(spent["theirs"]),
        "value": value,
        "their_value": other_value,
        "gradient_difference": ((gradient - other_gradient).norm() / other_gradient.norm()).item(),
    }
    ours_ms, theirs_ms = (f"{statistics.median(s):9.1f} ({min(s):.1f} to {max(s):.1f})" for s in spent.values())
    print(
        f"{name:28} B {row['rows']:5} d {row['width']:5}  ours {ours_ms:32} theirs {theirs_ms:32} "
        f"ratio {row['ratio']:.2f}  values {value:.7g} {other_value:.7g}, "
        f"gradients apart {row['gradient_difference']:.1e}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    # 1. What is compared
    cases: list[tuple[str, Loss, Loss, bool]] = [
        ("Matrix-SSL / released", matrix_ssl_loss, released_matrix_ssl, False),
        ("MEC / released", mec_loss, released_mec, False),
    ]
    lightly = lightly_losses()
    if isinstance(lightly, str):
        print(f"Without lightly: {lightly}.")
    else:
        cases += [
            ("VICReg / lightly", vicreg_loss, lightly[0], True),
            ("Barlow Twins / lightly", barlow_twins_loss, lightly[1], True),
        ]
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    setup = f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}"
    print(f"{setup}; milliseconds, median (range)")
    rows = []
    for batch in options.batches:
        z = views(batch, options.dim, options.device, getattr(torch, options.dtype))
        rows += [compare(case, ours, theirs, z, both, options.repeats) for case, ours, theirs, both in cases]
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
