"""What the losses of `--losses` read: the LM head's inputs, a teacher near the model, and ten tokens that are numbers.

Legend: N positions, H hidden width, V vocabulary size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lm_head.inputs import Shape, make_inputs

NUMBERS = 10  # tokens 0 to 9


class LossInputs(NamedTuple):
    hidden: Tensor  # (N, H), with a gradient
    weight: Tensor  # (V, H), with a gradient
    labels: Tensor  # (N,)
    teacher_hidden: Tensor  # (N, H)
    teacher_weight: Tensor  # (V, H)
    number_ids: Tensor  # (10,) the commonest labels
    number_values: Tensor  # (10,) 0 to 9


def make_loss_inputs(shape: Shape, seed: int) -> LossInputs:
    """`make_inputs`, with the model's own hidden states and weight under a little noise as the teacher's."""
    hidden, weight, labels = make_inputs(shape, seed)
    g = torch.Generator(shape.device).manual_seed(seed + 1)

    def disturb(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=g, device=x.device, dtype=torch.float32)
        return (x.detach() + 0.1 * x.detach().norm(dim=-1, keepdim=True) / x.shape[1] ** 0.5 * noise).to(x.dtype)

    ids = labels.bincount(minlength=shape.v).topk(NUMBERS).indices
    values = torch.arange(NUMBERS, device=labels.device, dtype=torch.float32)
    return LossInputs(hidden, weight, labels, disturb(hidden), disturb(weight), ids, values)
