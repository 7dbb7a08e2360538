"""The matrix Q that head and tail claims to solve (loss/head_tail.py), written out densely."""

import torch
from torch import Tensor
from torch.nn import functional as F

from matrix_llm.loss.vocabulary import summarise


def claimed_q(q: Tensor, kept: Tensor, embeddings: Tensor) -> Tensor:
    """(N, D, D) in float64, differentiable in all probabilities (N, V); a token may be in `kept` (N, S) twice."""
    e, u = F.normalize(embeddings, dim=-1), summarise(embeddings, torch.float64).directions
    (v, d), p = e.shape, u.shape[1]
    is_kept = torch.zeros(len(q), v, dtype=torch.float64).scatter(1, kept, 1.0)
    exact = torch.einsum("nv,vi,vj->nij", q * is_kept, e, e)
    others = q * (1 - is_kept)
    tail = torch.einsum("nv,vi,vj->nij", others, e @ u, e @ u)
    if p == d:
        return exact + u @ tail @ u.T
    left = ((others * e.square().sum(-1)).sum(-1) - tail.diagonal(dim1=1, dim2=2).sum(-1)) / (d - p)
    return exact + u @ tail @ u.T + left[:, None, None] * (torch.eye(d, dtype=torch.float64) - u @ u.T)
