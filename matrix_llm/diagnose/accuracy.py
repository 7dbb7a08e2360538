"""The error of the MCE solver that a run would use, against an accurate reference on the same positions.

The reference is Lanczos over the whole vocabulary with 32 steps in float64, itself checked on a few positions: against
the dense logarithm where that is affordable, else against 48 steps.

Legend: N positions, V vocabulary, D width.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from matrix_llm.diagnose.gradients import LMHead, Terms, TokenLoss, evaluate, overlap
from matrix_llm.diagnose.groups import by_cross_entropy
from matrix_llm.loss.settings import LossSettings
from matrix_llm.mce import token_mce

STEPS, MORE_STEPS = 32, 48
CHECKED = 4  # positions on which the reference itself is checked
BUDGET = 2.5e11  # multiplications that the reference may cost: about 15 s on two idle CPU cores
LEAST = 32  # positions, whatever they cost
DENSE_WIDTH, DENSE_BYTES = 1024, 2**31  # the dense logarithm up to this width, and this much memory for each position


def mce_loss(settings: LossSettings, vectors: Tensor) -> TokenLoss:
    """MCE over `vectors` (V, D) as a run with these settings computes it, in float32."""
    solver = settings.solver_for(len(vectors))
    return functools.partial(
        token_mce,
        embeddings=vectors,
        solver=solver.name,
        steps=solver.steps,
        order=solver.order,
        sketch_dim=solver.sketch_dim,
        top_k=solver.top_k,
    )


def _accurate(vectors: Tensor, **options: Any) -> TokenLoss:
    """MCE over `vectors` (V, D) in float64."""
    vectors = vectors.double()
    return lambda logits, labels: token_mce(logits.double(), labels, vectors, **options)


@dataclass(frozen=True)
class RangeError:
    """Mean relative errors over the positions in a range of CE."""

    positions: int
    """Positions in the range."""
    value: float
    """Mean of |MCE - reference| / reference."""
    logits: float
    """Mean of |g - reference| / |reference|, g the gradient of MCE in the logits of a position."""


@dataclass(frozen=True)
class SolverError:
    """How far the solver is from the reference."""

    positions: int
    """Positions compared."""
    by_ce: dict[str, RangeError]
    """For each range of CE that has positions."""
    sum_of_values: float | None
    """Relative error of the sum of MCE, with its sign."""
    hidden: float | None
    """|error| / |gradient| of CE + w MCE in the hidden states, over all positions together."""
    head: float | None
    """The same in the LM head's weight, of the summed gradient."""
    reference_check: str
    """What the reference was checked against."""
    reference_value: float
    """Largest relative difference of its values there."""
    reference_logits: float
    """Largest relative difference of its gradients in the logits there."""


def count_affordable(positions: int, vocabulary: int, width: int) -> int:
    """The number of positions that the reference can treat within its budget.

    >>> count_affordable(480, 49152, 576), count_affordable(480, 151936, 3584)
    (137, 32)
    """
    cost = 2 * STEPS * vocabulary * width
    return min(positions, max(LEAST, int(BUDGET // cost)))


def spread_by_ce(values: Tensor, count: int) -> Tensor:
    """`count` places of (N,) values, evenly spaced in their order, so that every range has its share."""
    order = values.argsort(stable=True)
    at = torch.linspace(0, len(values) - 1, count, dtype=torch.float64).round().long()
    return order[at.to(order.device)]


def measure_solver(
    solved: Terms,  # MCE at N positions, by the solver
    ce: Terms,  # CE there
    hidden: Tensor,  # (N, H)
    labels: Tensor,  # (N,)
    head: LMHead,
    vectors: Tensor,  # (V, D)
    weight: float,  # w, of MCE in the loss
) -> tuple[SolverError, Terms]:
    """The solver's error, and the reference's own terms."""
    reference = evaluate(_accurate(vectors, steps=STEPS), hidden, labels, head)
    # 1. position by position
    value = (solved.value - reference.value).abs() / reference.value.clamp(min=1e-12)
    norm = torch.linalg.vector_norm
    difference = solved.minus(reference)
    logits = norm(difference.logits, dim=-1) / norm(reference.logits, dim=-1).clamp(min=1e-30)
    by_ce = {
        name: RangeError(len(at), value[at].mean().item(), logits[at].mean().item())
        for name, at in by_cross_entropy(ce.value).items()
        if len(at)
    }
    # 2. all together, as a training step sees them
    everything = torch.arange(len(labels))
    pairs = ((difference, difference), (ce, ce), (ce, reference), (reference, reference))
    products = [overlap(a, b, hidden).of(everything) for a, b in pairs]
    errors = []
    for dd, cc, cr, rr in zip(*products, strict=True):
        square = cc + 2 * weight * cr + weight * weight * rr
        errors.append(weight * math.sqrt(max(dd, 0.0) / square) if square > 0 else None)
    total = reference.value.sum().item()
    # 3. the reference itself
    check, of_value, of_logits = _check_reference(reference, hidden, labels, head, vectors)
    error = SolverError(
        positions=len(labels),
        by_ce=by_ce,
        sum_of_values=(solved.value.sum().item() - total) / total if total else None,
        hidden=errors[0],
        head=errors[1],
        reference_check=check,
        reference_value=of_value,
        reference_logits=of_logits,
    )
    return error, reference


def _check_reference(
    reference: Terms, hidden: Tensor, labels: Tensor, head: LMHead, vectors: Tensor
) -> tuple[str, float, float]:
    size, width = vectors.shape
    options: dict[str, Any] = {"steps": MORE_STEPS}
    what = f"{MORE_STEPS} steps"
    if width <= DENSE_WIDTH and 8 * width * (3 * size + 6 * width) <= DENSE_BYTES:
        options, what = {"solver": "exact"}, "the dense logarithm"
    at = spread_by_ce(reference.value, min(CHECKED, len(labels)))
    better = evaluate(_accurate(vectors, **options), hidden[at], labels[at], head)
    mine, norm = reference.at(at), torch.linalg.vector_norm
    value = (mine.value - better.value).abs() / better.value.clamp(min=1e-12)
    logits = norm(mine.logits - better.logits, dim=-1) / norm(better.logits, dim=-1).clamp(min=1e-30)
    return f"{what}, {len(at)} positions", value.max().item(), logits.max().item()
