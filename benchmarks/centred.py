"""What `mce_embeddings: centred` changes on a trained model: vectors, MCE's gradient beside CE's, the solvers' errors.

    python benchmarks/centred.py MODEL rows.jsonl [--positions 240] [--template plain]

All in float64, over the response positions of rows that the model was not trained on, whatever their cross-entropy.
The reference is 32 Lanczos steps over the whole vocabulary.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse

import torch
from torch import Tensor

from benchmarks.solver_accuracy import predictions, value_and_gradient
from matrix_llm.information import effective_rank
from matrix_llm.loss.vocabulary import unit_vectors

SOLVERS = {
    "whole vocabulary, 6 steps": {"steps": 6},
    "whole vocabulary, 12 steps": {"steps": 12},
    "top 16 and tail, 6 steps": {"steps": 6, "top_k": 16},
    "top 32 and tail, 6 steps": {"steps": 6, "top_k": 32},
}


def mean_cosine(unit: Tensor) -> float:
    """Of two different vectors of (V, D)."""
    total = unit.sum(0)
    return ((total @ total - unit.square().sum()) / (len(unit) * (len(unit) - 1))).item()


def compare(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    weight: Tensor,  # (V, H)
    vectors: Tensor,  # (V, D)
) -> None:
    """Print one form of the vectors."""
    # 1. the vectors
    unit = unit_vectors(vectors, dtype=torch.float64)
    rank = effective_rank(unit.T @ unit / len(unit)).item()
    print(f"  two vectors have mean cosine {mean_cosine(unit):.3f}; effective rank {rank:.0f} of {unit.shape[1]}")

    # 2. MCE beside CE, and their gradients in the hidden states
    z = logits.clone().requires_grad_()
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    of_ce = torch.autograd.grad(ce.sum(), z)[0] @ weight
    exact, gradient = value_and_gradient(logits, labels, vectors, {"steps": 32}, chunk=32)
    of_mce = gradient @ weight
    cosine = torch.nn.functional.cosine_similarity(of_mce.flatten(), of_ce.flatten(), dim=0).item()
    print(
        f"  MCE / CE = {(exact.sum() / ce.sum()).item():.3f}; hidden gradient: cosine with CE's {cosine:.3f}, "
        f"norm {(of_mce.norm() / of_ce.norm()).item():.2f} of CE's"
    )

    # 3. the solvers: all values together, and the gradient of CE + MCE in the hidden states
    for name, kwargs in SOLVERS.items():
        value, gradient = value_and_gradient(logits, labels, vectors, kwargs)
        bias = (value.sum() / exact.sum() - 1).item()
        error = ((gradient @ weight - of_mce).norm() / (of_mce + of_ce).norm()).item()
        print(f"  {name}: sum of values {100 * bias:+.2f} %, hidden gradient {100 * error:.2f} %", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", help="a file of rows, or builtin")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--positions", type=int, default=240)
    args = parser.parse_args()
    hidden, weight, labels = predictions(args.model, args.rows, args.template, args.positions)
    weight = weight.double()
    logits = hidden.double() @ weight.T
    print(f"{len(labels)} positions, V = {weight.shape[0]}, D = {weight.shape[1]}")
    for name, vectors in (("lm_head", weight), ("centred", weight - weight.mean(0))):
        print(name)
        compare(logits, labels, weight, vectors)


if __name__ == "__main__":
    main()
