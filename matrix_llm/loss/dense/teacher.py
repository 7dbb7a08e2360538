"""Losses towards the distribution of a second model: distillation, ASFT, and cross-entropy with soft targets.

t = softmax(teacher's z / T), s = softmax(z / T), 0 log 0 = 0. A token with a logit of -inf in the model is impossible
for the teacher too: `reference` sees to that.

Legend: N positions that count, V vocabulary. Each function returns (N,) in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from matrix_llm.base.errors import DataError
from matrix_llm.loss.dense.label import dft
from matrix_llm.loss.dense.positions import Positions


def _log_probabilities(
    positions: Positions, *, temperature: float = 1.0, top_k: int | None = None, renormalise: bool = True
) -> Tensor:
    """log t, (N, V): -inf outside the teacher's top_k tokens, if given."""
    assert positions.teacher_logits is not None
    log_t = torch.log_softmax(positions.teacher_logits / temperature, dim=-1)
    if top_k is None or top_k >= log_t.shape[1]:
        return log_t
    kept = log_t.topk(top_k, dim=-1)
    values = torch.log_softmax(kept.values, dim=-1) if renormalise else kept.values
    return torch.full_like(log_t, -torch.inf).scatter(1, kept.indices, values)


def probabilities(positions: Positions, *, top_k: int | None = None) -> Tensor:
    """t, (N, V), at temperature 1; those of the teacher's top_k tokens sum to 1, the others are 0."""
    return _log_probabilities(positions, top_k=top_k).exp()


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_j a_j (log a_j - log b_j), where a sums to 1."""
    wrong = (log_a > -torch.inf) & (log_b == -torch.inf)
    if wrong.any():
        position, token = (int(i) for i in torch.nonzero(wrong)[0])
        raise DataError(
            f"KL(model || teacher) is infinite: at counted position {position} the teacher's logit of token {token} is "
            "-inf, the model's is not. Give the model -inf there too, or measure KL(teacher || model)."
        )
    impossible = log_a == -torch.inf
    return (log_a.exp() * (log_a.masked_fill(impossible, 0.0) - log_b.masked_fill(impossible, 0.0))).sum(-1)


def kd(positions: Positions, *, beta: float, temperature: float, top_k: int | None, renormalise: bool) -> Tensor:
    """beta KL(t || m) + (1 - beta) KL(s || m) with m = beta t + (1 - beta) s: the generalised Jensen-Shannon divergence
    (arXiv 2306.13649). beta = 0 is KL(t || s), and beta = 1 is KL(s || t).

    No factor T^2, as in TRL. Gradient (s - t) / T at beta = 0, s_j (l_j - sum_i s_i l_i) / T with l = log s - log t at
    beta = 1, and between (1 - beta) times the same with l = log s - log m.

    Args:
        top_k: the teacher's likeliest tokens; its others count as impossible.
        renormalise: whether the top_k probabilities are scaled to sum to 1. If not, this is no divergence, and can be
            negative.
    """
    log_t = _log_probabilities(positions, temperature=temperature, top_k=top_k, renormalise=renormalise)
    log_s = torch.log_softmax(positions.logits / temperature, dim=-1)
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    some_t = log_t.masked_fill(log_s == -torch.inf, 0.0)  # logaddexp has no gradient where both are -inf
    log_m = torch.logaddexp(log_s + math.log1p(-beta), some_t + math.log(beta))
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def asft(positions: Positions, *, weight: float, direction: str) -> Tensor:
    """DFT + weight KL (ASFT, arXiv 2509.23753).

    Args:
        direction: "ref_model", KL(reference || model), as both released codes compute it; or "model_ref",
            KL(model || reference).
    """
    beta = 0.0 if direction == "ref_model" else 1.0
    return dft(positions) + weight * kd(positions, beta=beta, temperature=1.0, top_k=None, renormalise=True)


def soft_ce(positions: Positions) -> Tensor:
    """-sum_j t_j log q_j: CE with the teacher's distribution as the target. Gradient q - t."""
    log_t, log_q = _log_probabilities(positions), positions.log_probabilities()
    return -(log_t.exp() * log_q.masked_fill(log_t == -torch.inf, 0.0)).sum(-1)
