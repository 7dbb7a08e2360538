"""What a loss changes: its gradient next to CE's, and the way that the weights went.

Legend: N trained positions, H hidden width, P parameters, K buckets of the sketch.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.pretrained_study.cache import CachedSet
from benchmarks.pretrained_study.split import Split
from benchmarks.pretrained_study.training import loss_settings
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.loss.linear import linear_loss
from matrix_llm.loss.settings import LossSettings

PROBE_ROWS = 8  # of the held-out set: the same for all arms, seeds and steps
BUCKETS = 2**16


def gradients(split: Split, states: Tensor, labels: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Gradient of the summed loss in the hidden states (N, H) and in the LM head (V, H)."""
    weight = split.upper.get_output_embeddings().weight.detach().clone().requires_grad_()
    states = states.detach().clone().requires_grad_()
    out = linear_loss(states, weight, labels, settings, embeddings=weight.detach(), reduction="sum")
    out.loss.backward()
    assert states.grad is not None
    assert weight.grad is not None
    return states.grad, weight.grad


def compare_with_ce(split: Split, heldout: CachedSet, overrides: Mapping[str, Any]) -> dict[str, float]:
    """Cosine of the loss's gradient with CE's, and its norm relative to CE's, in the hidden states and the LM head."""
    places = list(range(min(PROBE_ROWS, len(heldout.rows))))
    inputs = split.inputs([heldout.rows[i] for i in places], heldout.states(places))
    with evaluation_mode(split.upper), torch.no_grad():
        hidden = split.upper.base_model(**inputs.arguments, use_cache=False).last_hidden_state[:, :-1]
    kept = inputs.labels[:, 1:] != -100
    states, labels = hidden[kept].float(), inputs.labels[:, 1:][kept]
    found = {}
    of_ce = gradients(split, states, labels, LossSettings(mce_weight=0))
    for name, own, ce in zip(
        ("hidden", "head"), gradients(split, states, labels, loss_settings(overrides)), of_ce, strict=True
    ):
        found[f"cosine_{name}"] = round(torch.cosine_similarity(own.flatten(), ce.flatten(), 0).item(), 5)
        found[f"ratio_{name}"] = round((own.norm() / ce.norm()).item(), 5)
    return found


class Travel:
    """The weights' difference from where they began, as a count sketch: K sums of randomly signed parameters.

    Inner products of two sketches estimate those of the differences without bias, to about |x| |y| / sqrt(K) = 0.4 %,
    so that runs can be compared after their weights are gone.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self._start = [p.detach().cpu().clone() for p in split.trained]

    def sketch(self, buckets: int = BUCKETS) -> NDArray[np.float32]:
        """(K,) of the present difference."""
        generator = torch.Generator().manual_seed(0)  # the same hash for every run
        total = torch.zeros(buckets, dtype=torch.float64)
        for now, start in zip(self._split.trained, self._start, strict=True):
            moved = (now.detach().cpu() - start).flatten().double()
            place = torch.randint(buckets, (len(moved),), generator=generator)
            sign = torch.randint(2, (len(moved),), generator=generator) * 2 - 1
            total.index_add_(0, place, moved * sign)
        return total.float().numpy()
