"""Each loss on whole float32 logits, by autograd from its formula: what people write, and what a fused head replaces.

LLaMA-Factory and Axolotl compute theirs in this way. Settings are those of losses.GROUPS; each function takes logits
z (N, V) and returns the mean that is trained.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lm_head.loss_inputs import LossInputs


def logits_of(inputs: LossInputs) -> Tensor:
    """(N, V) the model's logits in float32."""
    return F.linear(inputs.hidden, inputs.weight).float()


@torch.no_grad()
def teacher_logits(inputs: LossInputs) -> Tensor:
    """(N, V) the teacher's logits in float32."""
    return F.linear(inputs.teacher_hidden, inputs.teacher_weight).float()


def cross_entropies(z: Tensor, inputs: LossInputs) -> Tensor:
    """(N,) -log p."""
    return F.cross_entropy(z, inputs.labels, reduction="none")


def dft(z: Tensor, inputs: LossInputs) -> Tensor:
    ce = cross_entropies(z, inputs)
    return ((-ce).exp().detach() * ce).mean()


def minus_p(z: Tensor, inputs: LossInputs) -> Tensor:
    return (1 - z.softmax(-1).gather(1, inputs.labels[:, None])).mean()


def power(z: Tensor, inputs: LossInputs, alpha: float = 8.0) -> Tensor:
    p = z.softmax(-1).gather(1, inputs.labels[:, None])
    return ((1 - p**alpha) / alpha).mean()


def threshold(z: Tensor, inputs: LossInputs, at: float = 0.1) -> Tensor:
    p = z.softmax(-1).gather(1, inputs.labels[:, None])
    kept = p.detach() >= at
    return ((1 - p) * kept).sum() / kept.sum()


def focal(z: Tensor, inputs: LossInputs, gamma: float = 2.0) -> Tensor:
    ce = cross_entropies(z, inputs)
    return ((1 - (-ce).exp()) ** gamma * ce).mean()


def eaft(z: Tensor, inputs: LossInputs, scale: float = 3.0) -> Tensor:
    with torch.no_grad():
        log_q = z.topk(20, dim=-1).values.log_softmax(-1)
        gate = -(log_q.exp() * log_q).sum(-1) / scale
    return (gate * cross_entropies(z, inputs)).mean()


def axolotl_eaft(z: Tensor, inputs: LossInputs) -> Tensor:
    return eaft(z, inputs, scale=1.0)


def z_loss(z: Tensor, inputs: LossInputs) -> Tensor:
    return (cross_entropies(z, inputs) + 1e-4 * z.logsumexp(-1) ** 2).mean()


def label_smoothing(z: Tensor, inputs: LossInputs) -> Tensor:
    return F.cross_entropy(z, inputs.labels, label_smoothing=0.1)


def gem(z: Tensor, inputs: LossInputs, h: str = "linear") -> Tensor:
    log_q = z.log_softmax(-1)
    of_label = log_q.gather(1, inputs.labels[:, None])
    with torch.no_grad():
        r = (z / 0.7).softmax(-1)
        if h == "logsigmoid":
            r *= torch.sigmoid(0.01 * (log_q - of_label))
    return -(r * (of_label - log_q)).sum(-1).mean()


def gem_logsigmoid(z: Tensor, inputs: LossInputs) -> Tensor:
    return gem(z, inputs, "logsigmoid")


def ntl(z: Tensor, inputs: LossInputs) -> Tensor:
    is_number = torch.isin(inputs.labels, inputs.number_ids)
    s = z[is_number][:, inputs.number_ids].softmax(-1)
    of_label = (inputs.labels[is_number, None] == inputs.number_ids).float() @ inputs.number_values
    distance = (inputs.number_values - of_label[:, None]).abs()
    return cross_entropies(z, inputs).mean() + 0.3 * (s * distance).sum(-1).mean()


def emo(z: Tensor, inputs: LossInputs) -> Tensor:
    unit = F.normalize(inputs.weight.detach(), dim=-1)
    ce = cross_entropies(z, inputs)
    d = 1 - ((z.softmax(-1) @ unit) * unit[inputs.labels]).sum(-1)
    ratio = (ce / (d + 1e-10)).detach().clamp(max=3.0)
    return (0.5 * (ce + ratio * d)).mean()


def asft(z: Tensor, inputs: LossInputs) -> Tensor:
    target = teacher_logits(inputs).softmax(-1)
    return dft(z, inputs) + 0.1 * F.kl_div(z.log_softmax(-1), target, reduction="none").sum(-1).mean()


def soft_ce(z: Tensor, inputs: LossInputs) -> Tensor:
    return F.cross_entropy(z, teacher_logits(inputs).softmax(-1))


FORMULAS: dict[str, tuple[str, Callable[[Tensor, LossInputs], Tensor]]] = {
    "dft": ("LLaMA-Factory's formula", dft),
    "minus_p": ("formula", minus_p),
    "power, alpha 8": ("formula", power),
    "threshold, at 0.1": ("formula", threshold),
    "focal": ("formula", focal),
    "eaft": ("LLaMA-Factory's formula", eaft),
    "eaft, scale 1": ("Axolotl's formula", axolotl_eaft),
    "z_loss": ("formula", z_loss),
    "label_smoothing": ("torch cross_entropy", label_smoothing),
    "gem": ("formula", gem),
    "gem, logsigmoid": ("formula", gem_logsigmoid),
    "ntl, weight 0.3": ("formula", ntl),
    "emo": ("formula", emo),
    "asft": ("LLaMA-Factory's formula", asft),
    "soft_ce": ("torch cross_entropy", soft_ce),
}
"""Label of a group in losses.GROUPS -> whose formula, and the loss of (logits, inputs)."""
