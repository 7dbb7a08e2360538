"""Losses that compare tokens by their vectors: EMO, and matrix cross-entropy with one label or with a soft target.

e_j is row j of E scaled to norm 1, a constant (a zero row stays zero); q = softmax(z).

Legend: N positions that count, V vocabulary, D embedding width. Each function returns (N,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from matrix_llm.information import matrix_log
from matrix_llm.loss.dense.positions import Positions
from matrix_llm.loss.dense.teacher import probabilities
from matrix_llm.loss.vocabulary import unit_vectors

_TINY = 1e-10  # what the released code adds to the denominators of its ratios


def _unit_vectors(positions: Positions) -> Tensor:
    assert positions.embeddings is not None
    return unit_vectors(positions.embeddings, dtype=positions.logits.dtype)


def emo_distance(positions: Positions) -> Tensor:
    """d = 1 - sum_j q_j cos(e_j, e_y), between 0 and 2. Gradient -q_j (c_j - sum_i q_i c_i), c = E e_y."""
    e = _unit_vectors(positions)
    cosines = (e[positions.labels] @ e.mT).clamp(-1, 1)  # (N, V)
    nonzero = (e[positions.labels] != 0).any(-1, keepdim=True).to(e.dtype)
    cosines = cosines.scatter(1, positions.labels.unsqueeze(1), nonzero)  # exactly 1, or d would be off as q_y -> 1
    return (positions.log_probabilities().exp() * (1 - cosines)).sum(-1)  # not 1 - sum q c, which cancels


def emo(positions: Positions, *, mode: int, clamp: float | None, with_target: bool) -> Tensor:
    """EMO (arXiv 2310.04691): (CE + [CE / d] d) / 2 in mode 1, [d / CE] CE + d in mode 2.

    Args:
        clamp: the largest ratio CE / d of mode 1; without one, the value is CE.
        with_target: False: d's value is larger by q_y, since the released patch leaves j = y out of the sum. The
            gradient of d is the same.
    """
    ce, d = positions.cross_entropy(), emo_distance(positions)
    if not with_target:
        d = d + torch.exp(-ce).detach()
    if mode == 2:
        return (d / (ce + _TINY)).detach() * ce + d
    ratio = (ce / (d + _TINY)).detach()
    if clamp is not None:
        ratio = ratio.clamp(max=clamp)
    return (ce + ratio * d) / 2


def _log_q(positions: Positions, e: Tensor) -> Tensor:
    """log Q with Q = sum_j q_j e_j e_j^T, (N, D, D)."""
    q = positions.log_probabilities().exp()
    return matrix_log(e.mT @ (q.unsqueeze(-1) * e))


def mce(positions: Positions) -> Tensor:
    """MCE = -e_y^T log(Q) e_y, by the dense logarithm (the paper's eq. 16; `matrix_llm.mce.token_mce`)."""
    e = _unit_vectors(positions)
    of_label = e[positions.labels]  # (N, D)
    return -torch.einsum("nd,nde,ne->n", of_label, _log_q(positions, e), of_label)


def soft_mce(positions: Positions, *, top_k: int | None) -> Tensor:
    """MCE = -tr(P log Q) with P = sum_i t_i e_i e_i^T, t the teacher's probabilities (eq. 16): all of them,
    or those of its top_k tokens alone.

    It is the mean, under t, of the MCE of each token as the label. Its smallest value, where Q = P, is -tr(P log P).
    """
    e = _unit_vectors(positions)
    p = e.mT @ (probabilities(positions, top_k=top_k).unsqueeze(-1) * e)  # (N, D, D)
    return -(p * _log_q(positions, e)).sum((-2, -1))
