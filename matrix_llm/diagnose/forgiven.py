"""What MCE forgives, and to which tokens.

At one position with target y, MCE forgives CE - MCE nats: it is 0 if all other likely tokens have vectors orthogonal to
the target's, and CE if they have its direction. The share of each other token j is taken as

    forgiven_j = (CE - MCE) q_j cos_jy^2 / sum_{k != y} q_k cos_ky^2

with cos_jy = e_j . e_y: to first order in the other tokens' probabilities, MCE = -log sum_j q_j cos_jy^2. So the
forgiven_j of a position sum to CE - MCE, and a token counts by its probability and its nearness to the target.

Legend: N positions, C positions of one chunk, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from matrix_llm.diagnose.gradients import LMHead
from matrix_llm.loss.vocabulary import unit_vectors

KEPT = 16  # tokens of each position that can enter the table of pairs
EDGES = (0.2, 0.4, 0.6, 0.8)
RANGES = ("below 0.2", "0.2 to 0.4", "0.4 to 0.6", "0.6 to 0.8", "0.8 and more")


@dataclass(frozen=True)
class ForgivenPair:
    """What MCE forgives to one token where another one is the target."""

    target: int
    """Id of the target."""
    token: int
    """Id of the token that is forgiven."""
    nats: float
    """Summed over the positions with this target."""
    positions: int
    """Positions with this target where the token is among the 16 that are forgiven most."""
    probability: float
    """Mean probability of the token there."""
    cosine: float
    """Of the two tokens' vectors."""


@dataclass(frozen=True)
class Forgiven:
    """CE - MCE over all positions."""

    nats: float
    """Mean over positions."""
    mean_cosine: float | None
    """Mean of |cos_jy| weighted by forgiven_j: how near the forgiven tokens are; None where nothing is forgiven."""
    by_cosine: dict[str, float]
    """Share of what is forgiven by |cos_jy| of the token it is forgiven to."""
    pairs: list[ForgivenPair]
    """The pairs with the most nats, most first."""


@torch.no_grad()
def forgiven(
    hidden: Tensor,  # (N, H)
    labels: Tensor,  # (N,)
    head: LMHead,
    vectors: Tensor,  # (V, D) any norm
    nats: Tensor,  # (N,) CE - MCE
    most: int = 20,
) -> Forgiven:
    """Attribute CE - MCE to tokens."""
    unit = unit_vectors(vectors, dtype=torch.float32)
    pairs: dict[tuple[int, int], list[float]] = {}
    binned, weighted = torch.zeros(len(RANGES), dtype=torch.float64), 0.0
    edges = torch.tensor(EDGES, device=hidden.device)
    for start in range(0, len(labels), head.chunk()):
        chunk = slice(start, start + head.chunk())
        # 1. forgiven_j of every token
        y = labels[chunk]
        q = torch.softmax(head.logits(hidden[chunk]), dim=-1)
        cosine = unit[y] @ unit.T
        share = q * cosine.square()
        share.scatter_(1, y[:, None], 0.0)
        total = share.sum(-1, keepdim=True)
        share = torch.where(total > 0, share / total.clamp(min=1e-37), 0.0) * nats[chunk, None].to(share.dtype)
        # 2. by cosine
        size = cosine.abs_()
        weighted += (share * size).sum(dtype=torch.float64).item()
        at = torch.bucketize(size, edges, right=True)
        for place in range(len(RANGES)):
            binned[place] += share[at == place].sum(dtype=torch.float64).item()
        # 3. the largest of each position, into the table of pairs
        values, tokens = share.topk(min(KEPT, share.shape[1]))
        of_each = zip(y.tolist(), values.tolist(), tokens.tolist(), q.gather(1, tokens).tolist(), strict=True)
        for target, row, ids, probabilities in of_each:
            for value, token, probability in zip(row, ids, probabilities, strict=True):
                entry = pairs.setdefault((target, token), [0.0, 0.0, 0.0])
                entry[0] += value
                entry[1] += 1
                entry[2] += probability
    best = sorted(pairs.items(), key=lambda item: -item[1][0])[:most]
    whole = binned.sum().item()
    return Forgiven(
        nats=nats.mean().item(),
        mean_cosine=weighted / whole if whole > 0 else None,
        by_cosine={
            name: part / whole if whole > 0 else 0.0 for name, part in zip(RANGES, binned.tolist(), strict=True)
        },
        pairs=[
            ForgivenPair(target, token, n, int(c), p / c, (unit[target].double() @ unit[token].double()).item())
            for (target, token), (n, c, p) in best
            if n > 0
        ],
    )
