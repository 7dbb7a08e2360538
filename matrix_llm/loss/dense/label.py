"""Losses of the label's probability, and of the logits around it.

z logits, q = softmax(z), L = logsumexp(z), y the label, p = q_y, CE = -log p. A term in [brackets] passes no gradient.
Where it says "weight w", the gradient in the logits is w (q - onehot(y)): that of CE, times w.

Legend: N positions that count, V vocabulary. Each function returns (N,) in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from matrix_llm.loss.dense.positions import Positions


def _one_minus_exp(x: Tensor) -> Tensor:
    """1 - e^-x. The difference cancels where x is small; where it is large, expm1's gradient, e^-x, would be rounded to
    that of 1 - (1 - e^-x)."""
    return torch.where(x < 0.5, -torch.expm1(-x), 1 - torch.exp(-x))


def cross_entropy(positions: Positions) -> Tensor:
    """CE. Weight 1."""
    return positions.cross_entropy()


def dft(positions: Positions) -> Tensor:
    """[p] CE (DFT, arXiv 2508.05629). Weight p."""
    ce = positions.cross_entropy()
    return torch.exp(-ce).detach() * ce


def minus_p(positions: Positions) -> Tensor:
    """1 - p (arXiv 2510.00526). Weight p: the gradient of DFT."""
    return power(positions, alpha=1.0)


def power(positions: Positions, *, alpha: float) -> Tensor:
    """(1 - p^alpha) / alpha (arXiv 2510.00526); CE at alpha = 0. Weight p^alpha."""
    ce = positions.cross_entropy()
    return ce if alpha == 0 else _one_minus_exp(alpha * ce) / alpha


def threshold(positions: Positions, *, base: str, side: str, at: float) -> Tensor:
    """1 - p or CE where p >= at ("top"), or p <= at ("bottom"), and 0 elsewhere (arXiv 2510.00526).

    The released code divides by the number of positions that are kept: those with p on the wanted side.
    """
    ce = positions.cross_entropy()
    p = torch.exp(-ce.detach())
    kept = p >= at if side == "top" else p <= at
    return torch.where(kept, _one_minus_exp(ce) if base == "p" else ce, 0.0)


def focal(positions: Positions, *, gamma: float) -> Tensor:
    """(1 - p)^gamma CE (Lin et al. 2017). Weight (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p."""
    ce = positions.cross_entropy()
    rest = _one_minus_exp(ce)
    return rest.clamp(min=torch.finfo(rest.dtype).tiny) ** gamma * ce  # below gamma = 1, the slope at p = 1 is infinite


def eaft(positions: Positions, *, alpha: float, k: int, scale: float) -> Tensor:
    """[(H_k / scale)^alpha] CE (EAFT, arXiv 2601.02151), H_k the entropy of the softmax over the k largest logits."""
    largest = positions.logits.detach().topk(min(k, positions.logits.shape[1]), dim=-1).values
    entropy = torch.special.entr(torch.softmax(largest, dim=-1)).sum(-1)
    return (entropy / scale) ** alpha * positions.cross_entropy()


def label_smoothing(positions: Positions, *, epsilon: float) -> Tensor:
    """(1 - epsilon) CE + epsilon mean_j(-log q_j). Gradient q - (1 - epsilon) onehot(y) - epsilon / V.

    Tokens whose logit is -inf are no part of the mean.
    """
    log_q = positions.log_probabilities()
    possible = positions.logits > -torch.inf
    mean = torch.where(possible, log_q, 0.0).sum(-1) / possible.sum(-1)
    return -(1 - epsilon) * positions.at_labels(log_q) - epsilon * mean


def z_loss(positions: Positions, *, weight: float) -> Tensor:
    """CE + weight L^2 (PaLM). Gradient (1 + 2 weight L) q - onehot(y)."""
    return positions.cross_entropy() + weight * torch.logsumexp(positions.logits, dim=-1) ** 2


def gem(positions: Positions, *, beta: float, h: str) -> Tensor:
    """-sum_j [r_j w_j] (log q_y - log q_j), r = softmax(z / beta) (GEM, arXiv 2408.16673).

    w_j is 1 ("linear"), or sigmoid(0.01 (z_j - z_y)) ("logsigmoid"). Gradient r_j w_j - (sum r w) onehot(y); for
    "linear" it is that of beta CE(z / beta). The value is negative where the label is already likely.
    """
    z_y = positions.at_labels(positions.logits).unsqueeze(1)
    gap = torch.where(
        positions.logits > -torch.inf, positions.logits - z_y, 0.0
    )  # log q_j - log q_y; r_j is 0 where it would be -inf
    r = torch.softmax(positions.logits.detach() / beta, dim=-1)
    w = torch.sigmoid(0.01 * gap.detach()) if h == "logsigmoid" else 1.0
    return (r * w * gap).sum(-1)
