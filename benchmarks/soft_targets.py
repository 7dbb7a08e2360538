"""Accuracy of MCE with soft targets, by block steps and by kept tokens, on two models' real predictions.

    python benchmarks/soft_targets.py STUDENT TEACHER rows.jsonl [--positions 40] [--target_tokens 4 16 32]

The student predicts at the trained positions of the rows, and the target is the teacher's `target_tokens` likeliest
tokens there, renormalised. Three teachers: "near", the teacher as it is; "flat", the same at temperature 3; "far", its
prediction for the position before, which has little to do with what the student predicts. The truth is the dense
logarithm in float64, by code of this file. In per cent, means over positions for value and logits:

    value     |v - v*| / v*
    logits    |g - g*| / |g*|, g the gradient in the logits
    sum       (sum of v - v*) / sum of v*
    hidden    |G - G*| / |G*|, G the gradient of the summed soft MCE in the hidden states
    ms        head and tail's milliseconds a position in float32, gradient included, on top of the head's products

Legend: N positions, V vocabulary, H = D width, k target tokens.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lm_head.inputs import unit
from benchmarks.output import markdown_table
from benchmarks.solver_accuracy import Predictions, predict
from matrix_llm.base.files import write_text
from matrix_llm.loss.settings import Solver
from matrix_llm.loss.soft_targets import soft_terms, teacher_matrix_entropy
from matrix_llm.loss.solvers import Embeddings, prepare_embeddings

BLOCK_STEPS = (1, 2, 3, 4, 6)
KEPT = (8, 16, 32, 64)
TEACHERS = ("near", "flat", "far")
COLUMNS = ("value", "logits", "sum", "hidden", "ms")


class Target(NamedTuple):
    ids: Tensor  # (N, k)
    weights: Tensor  # (N, k) that sum to 1


class Found(NamedTuple):
    value: Tensor  # (N,)
    gradient: Tensor  # (N, V) in the logits


def make_target(teacher: str, logits: Tensor, k: int) -> Target:
    """One of TEACHERS from the teacher's (N, V) logits."""
    logits = logits.roll(1, 0) if teacher == "far" else logits
    top = (logits / 3 if teacher == "flat" else logits).topk(k)
    return Target(top.indices, top.values.softmax(-1))


def truth(q: Tensor, targets: Sequence[Target], vectors: Tensor) -> list[Found]:
    """The dense logarithm of every position's Q, decomposed once for all targets, and its Frechet derivative."""
    values, gradients = ([[] for _ in targets] for _ in range(2))
    for n in range(len(q)):
        w, u = torch.linalg.eigh((vectors * q[n, :, None]).T @ vectors)
        w = w.clamp(min=1e-18)
        gap = w[:, None] - w
        kernel = torch.where(gap.abs() < 1e-7 * w, 1 / w, (w.log()[:, None] - w.log()) / torch.where(gap == 0, 1, gap))
        for i, (ids, weights) in enumerate(targets):
            along = (vectors[ids[n]] * weights[n, :, None].sqrt()) @ u  # (k, D)
            values[i].append(-(along.square().sum(0) * w.log()).sum())
            m = u @ (kernel * (along.T @ along)) @ u.T
            g = -((vectors @ m) * vectors).sum(-1)
            gradients[i].append(q[n] * (g - q[n] @ g))
    return [Found(torch.stack(v), torch.stack(g)) for v, g in zip(values, gradients, strict=True)]


def prepare(vectors: Tensor) -> dict[torch.dtype, Embeddings]:
    """Unit vectors with their summary, for both forms, in the two precisions."""
    solver = Solver("krylov", 6, 4, None, 1)
    return {dtype: prepare_embeddings(vectors.to(dtype), solver, dtype) for dtype in (torch.float64, torch.float32)}


def solve(q: Tensor, target: Target, embeddings: Embeddings, solver: Solver) -> Found:
    """The library's solver in float64."""
    value, gradient = soft_terms(q, target.ids, target.weights, embeddings, solver, want_gradient=True)
    assert gradient is not None
    return Found(value, gradient)


def milliseconds(q: Tensor, target: Target, embeddings: Embeddings, solver: Solver) -> float:
    """Of one position in float32, gradient included: the best of three."""
    q, weights, seconds = q.float(), target.weights.float(), []
    for _ in range(3):
        start = time.perf_counter()
        soft_terms(q, target.ids, weights, embeddings, solver, want_gradient=True)
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds) / len(q)


def errors(found: Found, true: Found, head: Tensor) -> dict[str, float]:
    wrong = found.gradient - true.gradient
    return {
        "value": ((found.value - true.value).abs() / true.value).mean().item(),
        "logits": (wrong.norm(dim=1) / true.gradient.norm(dim=1)).mean().item(),
        "sum": ((found.value - true.value).sum() / true.value.sum()).item(),
        "hidden": ((wrong @ head).norm() / (true.gradient @ head).norm()).item(),
    }


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table: per cent, and milliseconds where they were measured."""
    in_percent = [f"{100 * row[c]:.2f}" for c in COLUMNS[:-1]]
    return [row["solver"], *in_percent, f"{row['ms']:.1f}" if "ms" in row else ""]


def measure(student: Predictions, teacher_logits: Tensor, target_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """All solvers for all targets."""
    vectors = unit(student.head.weight)
    q = student.head.logits(student.hidden).softmax(-1)
    cases = [(teacher, k) for teacher in TEACHERS for k in target_tokens]
    targets = [make_target(teacher, teacher_logits, k) for teacher, k in cases]
    solvers = {f"whole vocabulary, {m} block steps": Solver("krylov", m, 4, None, None) for m in BLOCK_STEPS}
    solvers |= {f"top {s}, the target's and tail": Solver("krylov", 6, 4, None, s) for s in KEPT}
    results = []
    prepared = prepare(vectors)
    for (teacher, k), target, true in zip(cases, targets, truth(q, targets, vectors), strict=True):
        about = {
            "teacher": teacher,
            "k": k,
            "entropy": -torch.xlogy(target.weights, target.weights).sum(-1).mean().item(),
            "soft CE": -(target.weights * q.gather(1, target.ids).log()).sum(-1).mean().item(),
            "soft MCE": true.value.mean().item(),
            "ME(P)": teacher_matrix_entropy(*target, prepared[torch.float64]).mean().item(),
        }
        table = []
        for name, solver in solvers.items():
            row = errors(solve(q, target, prepared[torch.float64], solver), true, student.head.weight)
            if solver.top_k is not None:
                row["ms"] = milliseconds(q, target, prepared[torch.float32], solver)
            table.append({"solver": name, **row})
        print("\n" + ", ".join(f"{key} {x:.2f}" if isinstance(x, float) else f"{key} {x}" for key, x in about.items()))
        print(markdown_table(["solver", *COLUMNS], [cells(row) for row in table]), flush=True)
        results.append(about | {"table": table})
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="a model folder")
    parser.add_argument("teacher", help="a model folder with the same vocabulary")
    parser.add_argument("rows", help="a file of rows, or builtin")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--positions", type=int, default=40)
    parser.add_argument("--target_tokens", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    student, teacher = (
        predict(folder, args.rows, args.template, args.positions) for folder in (args.student, args.teacher)
    )
    if not torch.equal(student.labels, teacher.labels):
        raise SystemExit("error: student and teacher see different tokens. Give models with one tokenizer.")
    print(f"{len(student.labels)} positions, V = {student.head.weight.shape[0]}, D = {student.head.weight.shape[1]}")
    results = measure(student, teacher.head.logits(teacher.hidden), args.target_tokens)
    if args.json:
        write_text(args.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
