"""How far a solver is from the truth, in value and gradient, on the inputs and with the settings that are timed.

The truth is a 32-step float64 Lanczos recurrence over the whole vocabulary, which is itself compared with
`solver="exact"` on a few positions. It deliberately shares no code with the library.

Legend: P sampled positions, C positions of a chunk, K Lanczos steps, V vocabulary size, H hidden width, D = H.
"""

import functools
import statistics
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lm_head.implementations import Loss, eager, ours, run_once, why_too_large
from benchmarks.lm_head.inputs import Inputs, Shape, make_inputs, unit
from benchmarks.lm_head.names import EAGER, OURS_CE
from benchmarks.lm_head.timing import interleave, touch
from matrix_llm.mce import linear_matrix_cross_entropy, token_mce

SAMPLE_CE = (0.01, 2.0)  # below, value and error are both rounding noise of a confident prediction


class Truth(NamedTuple):
    sample: Tensor  # (P,) positions
    logits: Tensor  # (P, V) float64
    value: Tensor  # (P,) float64
    gradient: Tensor  # (P, V) float64, of the value in the logits
    check: list[float]  # relative error of value and gradient against `exact`
    inputs: dict[str, float]  # what the predictions look like


def lanczos_mce(logits: Tensor, labels: Tensor, vectors: Tensor, steps: int = 32) -> tuple[Tensor, Tensor]:
    """MCE (C,) and its gradient in the logits (C, V), orthogonalised twice.

    Args:
        logits: (C, V) float64.
        labels: (C,).
        vectors: (V, D) unit vectors of the vocabulary, float64.
    """
    # 1. The Krylov space of Q = sum_v q_v e_v e_v^T and the target's vector, and Q's tridiagonal matrix T in it.
    q = logits.softmax(-1)
    basis = [vectors[labels]]  # (C, D) each
    seen, t = [], torch.zeros(len(labels), steps, steps, dtype=q.dtype, device=q.device)
    for k in range(steps):
        seen.append(basis[-1] @ vectors.T)
        w = (q * seen[-1]) @ vectors
        t[:, k, k] = (w * basis[-1]).sum(-1)
        spanned = torch.stack(basis, 1)
        for _ in range(2):
            w = w - torch.bmm(torch.bmm(spanned, w[:, :, None]).mT, spanned)[:, 0]
        beta = w.norm(dim=-1)
        alive = beta > 1e-13
        if k + 1 < steps:
            t[:, k, k + 1] = t[:, k + 1, k] = torch.where(alive, beta, 0.0)
            basis.append(torch.where(alive, 1 / beta.clamp(min=1e-300), 0.0)[:, None] * w)

    # 2. The value, -e_1^T log(T) e_1. Where the space was exhausted, log 1 = 0 adds nothing.
    empty = t.diagonal(dim1=1, dim2=2) == 0
    values, eigenvectors = torch.linalg.eigh(t + torch.diag_embed(empty.to(t.dtype)))
    values = values.clamp(min=1e-18)
    log, first = values.log(), eigenvectors[:, 0]

    # 3. The gradient, through the derivative of log at T in the direction e_1 e_1^T, by divided differences.
    gap = values[:, :, None] - values[:, None]
    close = gap.abs() < 1e-9 * values[:, :, None]
    quotient = (log[:, :, None] - log[:, None]) / torch.where(close, 1.0, gap)
    factor = torch.where(close, 1 / values[:, :, None], quotient)
    derivative = eigenvectors @ (factor * first[:, :, None] * first[:, None]) @ eigenvectors.mT  # (C, K, K)
    u = torch.stack(seen, 1)  # (C, K, V)
    g = -(u * torch.bmm(derivative, u)).sum(1)
    return -(first**2 * log).sum(-1), q * (g - (q * g).sum(-1, keepdim=True))


def relative_error(made: Tensor, true: Tensor) -> float:
    """Mean over positions of ||made - true|| / ||true||."""
    made, true = made.double().reshape(len(true), -1), true.reshape(len(true), -1)
    return ((made - true).norm(dim=1) / true.norm(dim=1)).mean().item()


def describe_predictions(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy (N,) of each position, and what the predictions look like."""
    log_q = [F.log_softmax((h @ weight.T).float(), -1) for h in hidden.split(128)]  # (128, V) each
    ce = torch.cat([F.nll_loss(p, y, reduction="none") for p, y in zip(log_q, labels.split(128), strict=True)])
    return ce, {
        "mean CE": ce.mean().item(),
        "share with CE <= 2": (ce <= 2).double().mean().item(),
        "mean entropy": sum(-(p.exp() * p).sum().item() for p in log_q) / len(ce),
        "top-1 accuracy": torch.cat([p.argmax(-1) for p in log_q]).eq(labels).double().mean().item(),
        "mass beyond the 128 likeliest": 1 - torch.cat([p.topk(128).values.exp().sum(-1) for p in log_q]).mean().item(),
    }


def find_truth(inputs: Inputs, positions: int, exact_positions: int) -> Truth:
    """Values and gradients of the first `positions` with a CE in SAMPLE_CE, among the first 1,024."""
    hidden, weight, labels = (t.detach() for t in inputs)
    ce, stats = describe_predictions(hidden[:1024], weight, labels[:1024])
    sample = ((ce > SAMPLE_CE[0]) & (ce <= SAMPLE_CE[1])).nonzero()[:positions, 0]
    if not len(sample):
        raise SystemExit(f"error: no position of {len(ce)} has a CE in {SAMPLE_CE}; give more with --n.")
    weight = weight.double()
    vectors = unit(weight)
    logits = hidden[sample].double() @ weight.T
    made = [lanczos_mce(z, y, vectors) for z, y in zip(logits.split(8), labels[sample].split(8), strict=True)]
    value, gradient = torch.cat([m[0] for m in made]), torch.cat([m[1] for m in made])
    errors = []
    for i in range(min(exact_positions, len(sample))):  # the (D, D) logarithm: one position at a time
        z = logits[i : i + 1].clone().requires_grad_()
        exact = token_mce(z, labels[sample[i : i + 1]], vectors, solver="exact")
        (grad,) = torch.autograd.grad(exact.sum(), z)
        both = (value[i : i + 1], exact.detach()), (gradient[i : i + 1], grad)
        errors.append([relative_error(made, true) for made, true in both])
    return Truth(sample, logits, value, gradient, [statistics.fmean(e) for e in zip(*errors, strict=True)], stats)


def logits_gradient(
    hidden: Tensor, weight: Tensor, labels: Tensor, ce_gradient: Tensor, settings: dict[str, Any]
) -> Tensor:
    """MCE's gradient in the logits (P, V) from the fused pass: a zero bias receives it, one position at a time."""
    bias = torch.zeros(len(weight), device=weight.device, requires_grad=True)
    losses = linear_matrix_cross_entropy(hidden, weight, labels, bias=bias, reduction="none", **settings).loss
    made = [torch.autograd.grad(losses[i], bias, retain_graph=True)[0].double() for i in range(len(losses))]
    return torch.stack(made) - ce_gradient


def solver_errors(inputs: Inputs, true: Truth, settings: dict[str, Any]) -> dict[str, float]:
    """Mean relative errors of the value and of its gradient in the logits, both from the pass that is timed."""
    hidden, weight, labels = (t.detach() for t in inputs)
    y = labels[true.sample]
    with torch.no_grad():  # every position, as timed: a solver may share something within a chunk
        every = linear_matrix_cross_entropy(hidden, weight, labels, reduction="none", **settings)
    ce_gradient = true.logits.softmax(-1).scatter_add(1, y[:, None], torch.full_like(true.logits[:, :1], -1.0))
    gradient = logits_gradient(hidden[true.sample], weight, y, ce_gradient, settings)
    return {
        "value": relative_error(every.matrix_cross_entropy[true.sample], true.value),
        "gradient": relative_error(gradient, true.gradient),
    }


def solver_settings(kind: str, shape: Shape) -> dict[str, dict[str, Any]]:
    """The settings of one sweep, "steps" or "sketch", by name.

    Every setting is explicit, so that a changed default changes no row but the first. top_k = V is the whole
    vocabulary.
    """
    whole: dict[str, Any] = {"top_k": shape.v}
    settings: dict[str, dict[str, Any]] = {"the default": {}}
    if kind == "sketch":
        widths = [r for r in (128, 256, 512, 1024) if r < shape.h]
        for s in (16, 64):
            for r in widths:
                settings[f"top {s}, 6 steps, sketch {r}"] = {"top_k": s, "steps": 6, "sketch_dim": r}
        for r in widths:
            settings[f"vocabulary, 3 steps, sketch {r}"] = {**whole, "steps": 3, "sketch_dim": r}
        return settings
    for k in range(2, 9):
        settings[f"vocabulary, {k} steps"] = {**whole, "steps": k}
    for s in (8, 16, 32, 64, 256):
        for k in (4, 6, 8):
            settings[f"top {s}, {k} steps"] = {"top_k": s, "steps": k}
    settings["taylor, order 4"] = {"solver": "taylor", "order": 4}
    return settings


def measure_accuracy(shape: Shape, seed: int, positions: int, exact_positions: int) -> dict[str, Any]:
    """Errors of the default settings."""
    inputs = make_inputs(shape, seed)
    true = find_truth(inputs, positions, exact_positions)
    about = {"positions": len(true.sample), "exact_positions": exact_positions}
    return {**about, "check": true.check, "inputs": true.inputs, **solver_errors(inputs, true, {})}


def measure_solvers(
    kind: str, shape: Shape, seed: int, positions: int, exact_positions: int, repeats: int
) -> dict[str, Any]:
    """Errors and seconds of every setting of one sweep, and the seconds of CE alone."""
    inputs = make_inputs(shape, seed)
    true = find_truth(inputs, positions, exact_positions)
    errors, losses = {}, {}
    for name, settings in solver_settings(kind, shape).items():
        try:
            errors[name] = solver_errors(inputs, true, settings)
        except ValueError as error:  # a combination that the loss refuses, such as a sketch wider than the vectors
            print(f"  {name}: refused ({error})", flush=True)
            continue
        losses[name] = functools.partial(ours, **settings)
    ce_alone: dict[str, Loss] = {EAGER: eager, OURS_CE: functools.partial(ours, mce_weight=0.0)}
    losses |= {name: loss for name, loss in ce_alone.items() if not why_too_large(name, shape)}
    calls = {name: functools.partial(run_once, loss, inputs, shape) for name, loss in losses.items()}
    seconds = interleave(calls, functools.partial(touch, inputs.weight), repeats, shape.device)
    return {"errors": errors, "seconds": seconds, "positions": len(true.sample), "check": true.check}
