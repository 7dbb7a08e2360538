"""How much each token loss pulls at a position, by the probability that the label has: the figure of docs/losses.md.

    python benchmarks/token_loss_weights.py [--out docs/loss_weights.png]

The gradient of these losses in the logits is that of CE, q - onehot(y), times a weight. It is measured, by autograd
through `token_loss`, as the ratio of the two gradients in the label's logit.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.output import markdown_table, save_figure
from matrix_llm.losses import token_loss

LOSSES: dict[str, tuple[str, dict[str, Any], str]] = {  # name in the legend -> loss, settings, line
    "ce": ("ce", {}, "k-"),
    "focal, gamma 2": ("focal", {"gamma": 2}, "C3-"),
    "power, alpha 0.5": ("power", {"alpha": 0.5}, "C0--"),
    "dft, minus_p": ("dft", {}, "C0-"),
    "power, alpha 8": ("power", {"alpha": 8}, "C0:"),
    "threshold, logp, p >= 0.3": ("threshold", {"base": "logp", "at": 0.3}, "C2-"),
    "threshold, p, p <= 0.3": ("threshold", {"base": "p", "side": "bottom", "at": 0.3}, "C1-"),
}
SHOWN = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


def gradient_weights(
    probabilities: Tensor,  # (N,) of the label, between 0 and 1
    loss: str,
    settings: dict[str, Any],
) -> Tensor:
    """(N,) the loss's gradient in the label's logit, divided by CE's."""
    log_p, log_rest = probabilities.double().log(), (1 - probabilities.double()).log()
    logits = torch.stack([log_p, log_rest], dim=1)
    labels = torch.zeros(len(logits), dtype=torch.long)

    def gradient(name: str, **settings: Any) -> Tensor:
        z = logits.clone().requires_grad_()
        return torch.autograd.grad(token_loss(z, labels, name, **settings).sum(), z)[0][:, 0]

    return gradient(loss, **settings) / gradient("ce") + 0.0  # no -0


def draw() -> Figure:
    """Weight against probability, one line for each entry of LOSSES."""
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, (loss, settings, line) in LOSSES.items():
        axes.plot(p, gradient_weights(p, loss, settings), line, label=name, linewidth=1.5)
    axes.set_xlabel("probability p of the label")
    axes.set_ylabel("gradient, in units of CE's at the same p")
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.02, 1.35)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def table() -> str:
    """The same at a few probabilities, in Markdown."""
    p = torch.tensor(SHOWN, dtype=torch.float64)
    lines = [
        [name, *(f"{weight:.2g}" for weight in gradient_weights(p, loss, settings).tolist())]
        for name, (loss, settings, _) in LOSSES.items()
    ]
    return markdown_table(["weight at p =", *map(str, SHOWN)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/loss_weights.png"))
    args = parser.parse_args()
    save_figure(draw(), args.out)
    print(table())


if __name__ == "__main__":
    main()
