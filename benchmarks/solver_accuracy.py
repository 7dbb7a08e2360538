"""Accuracy of every MCE solver on the real predictions of a trained model (what each costs: lm_head.py).

    python benchmarks/solver_accuracy.py runs/gsm8k_small rows.jsonl [--positions 2000] [--json table.json]

Takes the hidden states of a model on rows it was not trained on, and compares each solver with the dense logarithm in
float64, in value and in the gradient in the logits, by the position's cross-entropy. Errors are means over positions of
|v - v*| / v* and ||g - g*|| / ||g*||, over positions with v* > 0.001 nats (below, both are rounding noise of a
confident prediction).
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from matrix_llm.base.files import write_text
from matrix_llm.data.readers import Source
from matrix_llm.data.rowset import RowSet
from matrix_llm.data.selection import drop_unusable
from matrix_llm.data.tokens import Encoder
from matrix_llm.mce import token_mce

BINS = {"CE <= 0.5": (0.0, 0.5), "0.5 to 2": (0.5, 2.0), "CE <= 2": (0.0, 2.0), "CE > 2": (2.0, float("inf"))}
SOLVERS = {
    **{f"whole vocabulary, {k} steps": {"steps": k} for k in (2, 3, 4, 6, 8, 12)},
    **{f"top {s} and tail, {k} steps": {"steps": k, "top_k": s} for s in (4, 8, 16, 32, 64) for k in (4, 6)},
    **{f"whole vocabulary, 6 steps, sketch {r}": {"steps": 6, "sketch_dim": r} for r in (64, 128)},
    **{f"top 16 and tail, 6 steps, sketch {r}": {"steps": 6, "top_k": 16, "sketch_dim": r} for r in (64, 128)},
    **{f"taylor, order {m}": {"solver": "taylor", "order": m} for m in (4, 16)},
}


def predictions(
    folder: str, rows: str, template: str, positions: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (N, H), LM head weight (V, H) and labels (N,) of the trained positions of unseen rows."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    unseen = RowSet(Source(rows, split="test", max_rows=200), root=None)
    longest = model.config.max_position_embeddings
    encoder = Encoder(tokenizer, unseen.layout, prompt_template=template, max_length=longest)
    data, _ = drop_unusable(unseen.tokens(encoder, rows), encoder, rows)
    hidden, labels = [], []
    with torch.no_grad():
        for row in data:
            state = model.base_model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0, :-1]
            label = torch.tensor(row["labels"][1:])
            hidden.append(state[label != -100])
            labels.append(label[label != -100])
            if sum(map(len, labels)) >= positions:
                break
    return torch.cat(hidden)[:positions], model.get_output_embeddings().weight.detach(), torch.cat(labels)[:positions]


def value_and_gradient(logits, labels, weight, kwargs, chunk=64):
    """MCE (N,) and its gradient in the logits (N, V), in float64."""
    values, gradients = [], []
    for start in range(0, len(labels), chunk):
        z = logits[start : start + chunk].clone().requires_grad_()
        value = token_mce(z, labels[start : start + chunk], weight, **kwargs)
        gradients.append(torch.autograd.grad(value.sum(), z)[0])
        values.append(value.detach())
    return torch.cat(values), torch.cat(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", help="a file of rows, or builtin")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    # 1. Predictions, and the exact value and gradient that solvers are compared with
    hidden, weight, labels = predictions(args.model, args.rows, args.template, args.positions)
    logits = hidden.double() @ weight.double().T
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    exact, exact_gradient = value_and_gradient(logits, labels, weight.double(), {"solver": "exact"}, chunk=8)
    counted = exact > 1e-3
    print(
        f"{len(labels)} positions, V = {weight.shape[0]}, D = {weight.shape[1]}, "
        f"mean CE {ce.mean():.3f}, mean MCE {exact.mean():.3f}"
    )
    for name, (low, high) in BINS.items():
        print(f"  {name}: {int(((ce >= low) & (ce <= high) & counted).sum())} positions")

    # 2. Mean errors of each solver, by the position's cross-entropy
    table = []
    print(f"\n| solver | {' | '.join(BINS)} |\n|---|{'---|' * len(BINS)}")
    for name, kwargs in SOLVERS.items():
        value, gradient = value_and_gradient(logits, labels, weight.double(), kwargs)
        value_error = (value - exact).abs() / exact
        gradient_error = (gradient - exact_gradient).norm(dim=1) / exact_gradient.norm(dim=1)
        row = {"solver": name}
        for label, (low, high) in BINS.items():
            chosen = (ce >= low) & (ce <= high) & counted
            row[label] = [value_error[chosen].mean().item(), gradient_error[chosen].mean().item()]
        table.append(row)
        print(
            f"| {name} | " + " | ".join(f"{100 * v:.2f} / {100 * g:.2f}" for v, g in (row[b] for b in BINS)) + " |",
            flush=True,
        )
    if args.json:
        write_text(
            args.json, json.dumps({"positions": len(labels), "vocabulary": weight.shape[0], "table": table}, indent=1)
        )


if __name__ == "__main__":
    main()
