"""Accuracy of every MCE solver on a trained model's real predictions, over ALL positions (the cost: lm_head.py).

    python benchmarks/solver_accuracy.py MODEL rows.jsonl [--positions 240] [--heads own centred clusters random]

Each solver is compared, on rows that the model was not trained on, with 32 Lanczos steps over the whole vocabulary in
float64, which are themselves compared with `exact` on a few positions. Most of the loss and of its gradient comes from
the positions that are predicted badly, so the columns that matter to training are sums over every position:

    sum of values       (sum of v - v*) / sum of v*: the bias of the reported MCE
    mean |error|        sum of |v - v*| / sum of v*
    hidden, head        |G - G*| / |G*|, G the gradient of the summed CE + MCE in the hidden states and in the LM head
    MCE alone           the same for MCE's own gradient in the hidden states
    worst               the largest |v - v*| / v* of a position

The columns by cross-entropy are means over positions of |v - v*| / v* and of |g - g*| / |g*|, g the gradient in the
logits. Relative errors leave out positions with v* < 0.001 nats, where both are rounding noise; sums leave out none.

`--heads` compares other token vectors under the same predictions: "centred" are the head's own minus their mean,
"clusters" moves every vector to within a cosine of 0.999 of the nearest of V / 8 vectors (a head full of
near-duplicates), "random" are Gaussian vectors.

Legend: N positions, V vocabulary, H hidden width, D = H width of the token vectors.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.lm_head.accuracy import lanczos_mce
from benchmarks.lm_head.inputs import unit
from benchmarks.output import markdown_table
from matrix_llm.base.files import write_text
from matrix_llm.data.readers import Source
from matrix_llm.data.rowset import RowSet
from matrix_llm.data.selection import drop_unusable
from matrix_llm.data.tokens import Encoder
from matrix_llm.diagnose.gradients import LMHead
from matrix_llm.diagnose.head import describe_rows
from matrix_llm.mce import linear_matrix_cross_entropy, token_mce

BINS = {"CE < 2": (0.0, 2.0), "2 to 5": (2.0, 5.0), "CE > 5": (5.0, math.inf)}
COUNTED = 1e-3  # nats; below, a relative error is rounding noise of a confident prediction
SUMS = ("sum of values", "mean |error|", "hidden", "head", "MCE alone", "worst")
FUSED = "the default, fused, float32"  # as it trains; the other rows are float64
WORST_OF = ("top 16 and tail, 6 steps", "top 32 and tail, 6 steps")  # whose worst positions are printed
HEADS = ("own", "centred", "clusters", "random")
SOLVERS: dict[str, dict[str, Any]] = {
    **{f"whole vocabulary, {k} steps": {"steps": k} for k in (2, 3, 4, 6, 8, 12)},
    **{
        f"top {s} and tail, {k} steps": {"top_k": s, "steps": k}
        for s, k in [(8, 6), (16, 4), (16, 6), (16, 8), (16, 12), (32, 6), (32, 8), (32, 12), (64, 6), (64, 12)]
    },
    "whole vocabulary, 6 steps, sketch 256": {"steps": 6, "sketch_dim": 256},
    "taylor, order 4": {"solver": "taylor", "order": 4},
    "taylor, order 16": {"solver": "taylor", "order": 16},
}


class Predictions(NamedTuple):
    """What a model predicts at the trained positions of unseen rows, in float64."""

    hidden: Tensor  # (N, H)
    head: LMHead
    labels: Tensor  # (N,)
    tokens: list[str]  # N, the labels' text


class Found(NamedTuple):
    """A solver's MCE and its gradient in the logits."""

    value: Tensor  # (N,)
    gradient: Tensor  # (N, V)


def predict(folder: str, rows: str, template: str, positions: int) -> Predictions:
    """The first `positions` trained positions of at most 200 rows."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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
    if not sum(map(len, labels)):
        raise SystemExit(f"error: no position of {rows} is trained. Give rows with responses.")
    head, label = LMHead.of(model), torch.cat(labels)[:positions]
    bias = None if head.bias is None else head.bias.double()
    head = dataclasses.replace(head, weight=head.weight.double(), bias=bias)
    tokens = [tokenizer.decode([i]) for i in label.tolist()]
    return Predictions(torch.cat(hidden)[:positions].double(), head, label, tokens)


def token_vectors(head: str, weight: Tensor) -> Tensor:
    """(V, D) unit vectors of one of HEADS."""
    e = unit(weight)
    if head == "own":
        return e
    if head == "centred":
        return unit(weight - weight.mean(0))
    noise = torch.randn(e.shape, dtype=e.dtype, generator=torch.Generator().manual_seed(0))
    if head == "random":
        return unit(noise)
    centres = e[::8]
    nearest = torch.cat([(part.float() @ centres.float().T).argmax(1) for part in e.split(2048)])
    return unit(centres[nearest] + math.sqrt(1 / 0.999**2 - 1) * unit(noise))


def reference(logits: Tensor, labels: Tensor, vectors: Tensor) -> Found:
    """32 steps over the whole vocabulary, by code that the library does not share."""
    made = [lanczos_mce(z, y, vectors) for z, y in zip(logits.split(8), labels.split(8), strict=True)]
    return Found(torch.cat([m[0] for m in made]), torch.cat([m[1] for m in made]))


def solve(logits: Tensor, labels: Tensor, vectors: Tensor, settings: dict[str, Any], chunk: int = 60) -> Found:
    """The library's solver with these settings, in float64."""
    values, gradients = [], []
    for z, y in zip(logits.split(chunk), labels.split(chunk), strict=True):
        z = z.clone().requires_grad_()
        value = token_mce(z, y, vectors, **settings)
        gradients.append(torch.autograd.grad(value.sum(), z)[0])
        values.append(value.detach())
    return Found(torch.cat(values), torch.cat(gradients))


def relative(made: Tensor, true: Tensor) -> float:
    return ((made - true).norm() / true.norm()).item()


def value_errors(value: Tensor, true: Tensor) -> dict[str, float]:
    counted = true > COUNTED
    return {
        "sum of values": ((value - true).sum() / true.sum()).item(),
        "mean |error|": ((value - true).abs().sum() / true.sum()).item(),
        "worst": ((value - true).abs() / true)[counted].max().item(),
    }


class Sizes(NamedTuple):
    """Norms of the true gradients, which errors are divided by."""

    hidden: float  # of CE + MCE, in the hidden states
    head: float  # of CE + MCE, in the LM head
    mce: float  # of MCE, in the hidden states


def errors(given: Predictions, logits: Tensor, ce: Tensor, found: Found, true: Found, sizes: Sizes) -> dict[str, Any]:
    """All figures of one solver, with its worst positions."""
    wrong = given.head.before_transform(found.gradient - true.gradient, logits)
    in_hidden = wrong @ given.head.weight
    row: dict[str, Any] = value_errors(found.value, true.value) | {
        "hidden": in_hidden.norm().item() / sizes.hidden,
        "head": (wrong.T @ given.hidden).norm().item() / sizes.head,
        "MCE alone": in_hidden.norm().item() / sizes.mce,
    }
    value_error = (found.value - true.value).abs() / true.value
    gradient_error = (found.gradient - true.gradient).norm(dim=1) / true.gradient.norm(dim=1)
    for name, (low, high) in BINS.items():
        chosen = (ce >= low) & (ce < high) & (true.value > COUNTED)
        row[name] = [value_error[chosen].mean().item(), gradient_error[chosen].mean().item()]
    share = in_hidden.square().sum(1) / in_hidden.square().sum()
    row["worst positions"] = [
        {
            "position": i,
            "token": given.tokens[i],
            "CE": ce[i].item(),
            "MCE": true.value[i].item(),
            "found": found.value[i].item(),
            "share": share[i].item(),
        }
        for i in share.topk(min(5, len(ce))).indices.tolist()
    ]
    return row


def fused_errors(given: Predictions, vectors: Tensor, true: Found, total: Tensor) -> dict[str, float]:
    """The same figures of the fused pass with its own defaults, in float32, where they can be had from it.

    Args:
        total: (N, V) the true gradient of CE + MCE, before the logits' scale.
    """
    head = given.head
    hidden, weight = (x.float().requires_grad_() for x in (given.hidden, head.weight))
    out = linear_matrix_cross_entropy(
        hidden, weight, given.labels, bias=None if head.bias is None else head.bias.float(),
        embeddings=vectors.float(), logit_scale=head.scale, softcap=head.softcap, reduction="sum",
    )  # fmt: skip
    grad_hidden, grad_weight = torch.autograd.grad(out.loss, [hidden, weight])
    return value_errors(out.matrix_cross_entropy.double(), true.value) | {
        "hidden": relative(grad_hidden.double(), total @ head.weight),
        "head": relative(grad_weight.double(), total.T @ given.hidden),
    }


def cells(row: dict[str, Any]) -> list[str]:
    by_ce = [f"{100 * row[b][0]:.2f} / {100 * row[b][1]:.2f}" if b in row else "" for b in BINS]
    return by_ce + [f"{100 * row[name]:{'+' if 'sum' in name else ''}.2f}" if name in row else "" for name in SUMS]


def as_cells(worst: dict[str, Any]) -> list[str]:
    return [f"{value:.3f}" if isinstance(value, float) else repr(value) for value in worst.values()]


def measure_head(
    head: str, given: Predictions, solvers: dict[str, dict[str, Any]], exact_positions: int
) -> dict[str, Any]:
    """All solvers against the reference, with the token vectors of one of HEADS."""
    # 1. the reference, and how far it is from `exact` itself
    vectors, logits = token_vectors(head, given.head.weight), given.head.logits(given.hidden)
    true = reference(logits, given.labels, vectors)
    few = slice(0, exact_positions)
    exact = solve(logits[few], given.labels[few], vectors, {"solver": "exact"}, chunk=1)
    check = [relative(true.value[few], exact.value), relative(true.gradient[few], exact.gradient)]

    # 2. what is being predicted
    ce = F.cross_entropy(logits, given.labels, reduction="none")
    q = logits.softmax(-1)
    ce_gradient = q.scatter_add(1, given.labels[:, None], torch.full_like(q[:, :1], -1.0))
    ce_gradient, mce_gradient = (given.head.before_transform(g, logits) for g in (ce_gradient, true.gradient))
    total = ce_gradient + mce_gradient
    of_ce, of_mce = ce_gradient @ given.head.weight, mce_gradient @ given.head.weight
    of_head = total.T @ given.hidden
    sizes = Sizes((of_ce + of_mce).norm().item(), of_head.norm().item(), of_mce.norm().item())
    about: dict[str, Any] = {
        "head": head,
        "positions": len(ce),
        "vocabulary": len(vectors),
        "width": vectors.shape[1],
        "mean cosine": describe_rows(vectors).mean_cosine,
        "CE": ce.mean().item(),
        "MCE": true.value.mean().item(),
        "positions by CE": {b: int(((ce >= low) & (ce < high)).sum()) for b, (low, high) in BINS.items()},
        "reference against exact, value and gradient": check,
        "cosine of MCE's hidden gradient with CE's": F.cosine_similarity(of_ce.flatten(), of_mce.flatten(), 0).item(),
        "mass of the 16 likeliest": q.topk(16).values.sum(-1).mean().item(),
    }
    print(f"\n{json.dumps(about, indent=1)}\n", flush=True)

    # 3. every solver
    table = []
    for name, settings in solvers.items():
        found = solve(logits, given.labels, vectors, settings)
        table.append({"solver": name, **errors(given, logits, ce, found, true, sizes)})
        print(f"  {name}: " + ", ".join(cells(table[-1])), file=sys.stderr, flush=True)
    table.append({"solver": FUSED, **fused_errors(given, vectors, true, total)})
    print(markdown_table(["solver", *BINS, *SUMS], [[row["solver"], *cells(row)] for row in table]), flush=True)
    return about | {"table": table}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder")
    parser.add_argument("rows", help="a file of rows, or builtin")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--positions", type=int, default=240, help="each takes 24 V bytes")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["own"])
    parser.add_argument("--exact-positions", type=int, default=4, help="positions to compare with the dense logarithm")
    parser.add_argument("--only", nargs="+", default=[], help="solvers whose name contains one of these, e.g. 'top 16'")
    parser.add_argument("--json", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(arguments)
    solvers = {n: s for n, s in SOLVERS.items() if not args.only or any(part in n for part in args.only)}
    given = predict(args.model, args.rows, args.template, args.positions)
    results = [measure_head(head, given, solvers, args.exact_positions) for head in args.heads]
    for result in results:
        for row in result["table"]:
            if row["solver"] in WORST_OF:
                print(
                    f"\n{result['head']}, {row['solver']}: the largest shares of the squared error in the hidden states"
                )
                print(markdown_table(list(row["worst positions"][0]), [as_cells(w) for w in row["worst positions"]]))
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
