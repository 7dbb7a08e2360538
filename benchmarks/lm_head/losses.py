"""Every token loss, ours and its peers: what `--losses` times, in groups that compute the same loss.

    GROUPS           label of a group -> our loss, its settings, and the target of its time
    implementations  everything that can run of one group

The first implementation of each group is our own CE, of which the others' times are multiples.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lm_head.implementations import Implementations, products
from benchmarks.lm_head.loss_inputs import LossInputs
from benchmarks.lm_head.names import CE, OURS, OURS_CE, PRODUCTS
from benchmarks.lm_head.whole_logits import FORMULAS, logits_of, teacher_logits
from matrix_llm.loss.choice import NEEDS_TEACHER
from matrix_llm.losses import Teacher, linear_token_loss

Loss = Callable[[LossInputs], Tensor]
NO_EXTRA_PRODUCT, EMO_TARGET = 1.05, 1.35  # times our own CE


@dataclass(frozen=True)
class Group:
    """One loss of ours."""

    loss: str
    """A key of `matrix_llm.loss.choice.LOSSES`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Its settings, without the number tokens."""
    target: float | None = None
    """Largest time, as a multiple of our own CE's; None: no target."""


GROUPS = {
    CE: Group("ce"),
    "dft": Group("dft", target=NO_EXTRA_PRODUCT),
    "minus_p": Group("minus_p", target=NO_EXTRA_PRODUCT),
    "power, alpha 8": Group("power", {"alpha": 8.0}, NO_EXTRA_PRODUCT),
    "threshold, at 0.1": Group("threshold", {"at": 0.1}, NO_EXTRA_PRODUCT),
    "focal": Group("focal", target=NO_EXTRA_PRODUCT),
    "eaft": Group("eaft", target=NO_EXTRA_PRODUCT),
    "eaft, scale 1": Group("eaft", {"scale": 1.0}, NO_EXTRA_PRODUCT),
    "z_loss": Group("z_loss", target=NO_EXTRA_PRODUCT),
    "label_smoothing": Group("label_smoothing", target=NO_EXTRA_PRODUCT),
    "gem": Group("gem", target=NO_EXTRA_PRODUCT),
    "gem, logsigmoid": Group("gem", {"h": "logsigmoid"}, NO_EXTRA_PRODUCT),
    "ntl, weight 0.3": Group("ntl", {"weight": 0.3}, NO_EXTRA_PRODUCT),
    "emo": Group("emo", target=EMO_TARGET),
    "asft": Group("asft"),
    "soft_ce": Group("soft_ce"),
    "kd, beta 0": Group("kd"),
    "kd, beta 0.5": Group("kd", {"beta": 0.5}),
    "kd, beta 1": Group("kd", {"beta": 1.0}),
}


def ours(inputs: LossInputs, loss: str, settings: dict[str, Any], mce_weight: float = 0.0) -> Tensor:
    if loss == "ntl":
        settings = settings | {"number_ids": inputs.number_ids, "number_values": inputs.number_values}
    teacher = Teacher(inputs.teacher_hidden, inputs.teacher_weight) if loss in NEEDS_TEACHER else None
    head = (inputs.hidden, inputs.weight, inputs.labels)
    return linear_token_loss(*head, loss, mce_weight=mce_weight, settings=settings, teacher=teacher).loss


def implementations(label: str, device: str) -> Implementations[Loss | None]:
    """Everything of one group that can run on this device; None: the three products alone.

    Args:
        label: a key of GROUPS.
    """
    group = GROUPS[label]
    result: Implementations[Loss | None] = Implementations()
    result.found[OURS_CE] = functools.partial(ours, loss="ce", settings={})
    if label == CE:
        result.found |= {OURS: functools.partial(ours, loss="ce", settings={}, mce_weight=1.0), PRODUCTS: None}
        result.found["torch cross_entropy, whole logits"] = lambda inputs: F.cross_entropy(
            logits_of(inputs), inputs.labels
        )
    else:
        result.found[f"matrix_llm, {group.loss}"] = functools.partial(ours, loss=group.loss, settings=group.settings)
    if label in FORMULAS:
        whose, formula = FORMULAS[label]
        result.found[f"{whose}, whole logits"] = lambda inputs: formula(logits_of(inputs), inputs)
    _add_trl(result, group)
    if label == "label_smoothing":
        _add_smoother(result)
    _add_liger(result, group, device)
    return result


def _add_trl(result: Implementations[Loss | None], group: Group) -> None:
    name = "TRL, chunked head"
    if group.loss not in ("ce", "dft", "kd"):
        return
    try:
        from trl.experimental.gkd import GKDTrainer
        from trl.kernels import ChunkedLogProbFunction
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        result.absent[name] = f"not importable ({error})"
        return

    def log_probabilities(inputs: LossInputs) -> Tensor:
        arguments = (inputs.labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
        return ChunkedLogProbFunction.apply(inputs.hidden, inputs.weight, None, *arguments)[0]

    def dft(inputs: LossInputs) -> Tensor:
        logs = log_probabilities(inputs)
        return -(logs * logs.exp().detach()).mean()

    def divergence(inputs: LossInputs) -> Tensor:
        teacher = (inputs.teacher_hidden, inputs.teacher_weight, None)
        return ChunkedDivergenceFunction.apply(inputs.hidden, inputs.weight, None, *teacher, beta)[0].mean()

    def whole(inputs: LossInputs) -> Tensor:
        return GKDTrainer.generalized_jsd_loss(logits_of(inputs), teacher_logits(inputs), beta=beta)

    if group.loss == "kd":
        beta = group.settings.get("beta", 0.0)
        result.found |= {name: divergence, "TRL generalized_jsd_loss, whole logits": whole}
    else:
        result.found[name] = dft if group.loss == "dft" else lambda inputs: -log_probabilities(inputs).mean()


def _add_smoother(result: Implementations[Loss | None]) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    result.found["transformers LabelSmoother, whole logits"] = lambda inputs: LabelSmoother(0.1)(
        {"logits": logits_of(inputs)}, inputs.labels
    )


def _add_liger(result: Implementations[Loss | None], group: Group, device: str) -> None:
    """Liger's fused head is Triton alone; its distillation is torch, and runs anywhere."""
    head: dict[str, dict[str, Any]] = {
        "ce": {},
        "dft": {"use_token_scaling": True},
        "label_smoothing": {"label_smoothing": 0.1},
        "z_loss": {"lse_square_scale": 1e-4},
    }
    if group.loss not in (*head, "kd"):
        return
    name = "Liger, chunked" if group.loss == "kd" else "Liger, fused"
    if importlib.util.find_spec("liger_kernel") is None:
        result.absent[name] = "liger_kernel is not installed"
    elif group.loss == "kd":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, group.settings.get("beta", 0.0), compiled=device == "cuda")
        result.found[name] = lambda inputs: loss(
            inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels
        )
    elif device != "cuda":
        result.absent[name] = "it needs a GPU"
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(**head[group.loss])
        result.found[name] = lambda inputs: fused(inputs.weight, inputs.hidden, inputs.labels)


def run_once(loss: Loss | None, inputs: LossInputs, chunk: int) -> None:
    """One forward and backward pass, with gradients in hidden and weight; None: the products alone."""
    if loss is None:
        with torch.no_grad():
            products(inputs.hidden, inputs.weight, chunk)
    else:
        torch.autograd.grad(loss(inputs), (inputs.hidden, inputs.weight))
