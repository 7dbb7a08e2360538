"""Ours and its peers: everything that computes a loss from hidden states (N, H), weight (V, H) and labels (N,)."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lm_head.inputs import Inputs, Shape
from benchmarks.lm_head.names import EAGER, OURS, OURS_AGAIN, OURS_CE, TORCH_REFERENCE
from matrix_llm.loss.vocabulary import summarise
from matrix_llm.mce import linear_matrix_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
L = TypeVar("L")


@dataclass
class Implementations(Generic[L]):
    found: dict[str, L] = field(default_factory=dict)
    """Name -> loss, here of (hidden, weight, labels)."""
    absent: dict[str, str] = field(default_factory=dict)
    """Name -> the reason."""


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    return linear_matrix_cross_entropy(hidden, weight, labels, **settings).loss


class LaterMicroBatch:
    """Ours as the later micro-batches of an optimizer step run it: the weight is summarised once, at the first call."""

    def __init__(self) -> None:
        self.summaries: dict[int, Any] = {}

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        place = weight.data_ptr()
        if place not in self.summaries:
            self.summaries[place] = summarise(weight.detach(), torch.float32)
        return ours(hidden, weight, labels, summary=self.summaries[place])


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def weight_first(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss(weight, hidden, labels)


def implementations(device: str) -> Implementations[Loss]:
    """Everything that can run on this device. Optional packages are imported here."""
    result: Implementations[Loss] = Implementations({
        OURS: ours,
        OURS_AGAIN: LaterMicroBatch(),
        OURS_CE: functools.partial(ours, mce_weight=0.0),
        EAGER: eager,
    })  # fmt: skip
    add_torch(result)
    add_trl(result)
    add_gpu_packages(result, device)
    return result


def add_torch(result: Implementations[Loss]) -> None:
    if not hasattr(F, "linear_cross_entropy"):
        result.absent["torch linear_cross_entropy"] = f"needs torch >= 2.13, and this is {torch.__version__}"
        return
    options = torch.nn.LinearCrossEntropyOptions
    result.found[TORCH_REFERENCE] = F.linear_cross_entropy  # options=None: full logits, as in eager
    chunked = {"auto": options(), **{f"chunk {size}": options(batch_chunk_size=size) for size in (256, 1024)}}
    for name, chosen in chunked.items():
        result.found[f"torch linear_cross_entropy, {name}"] = functools.partial(F.linear_cross_entropy, options=chosen)


def add_trl(result: Implementations[Loss]) -> None:
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except ImportError as error:
        result.absent["TRL, chunked head"] = f"not importable ({error})"
        return

    def trl_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # log_probs alone: the cheapest outputs that give the loss
        arguments = (hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
        return -ChunkedLogProbFunction.apply(*arguments)[0].mean()

    result.found["TRL, chunked head"] = trl_head


def add_gpu_packages(result: Implementations[Loss], device: str) -> None:
    for name, module in {"Liger, fused": "liger_kernel", "Apple, cut-cross-entropy": "cut_cross_entropy"}.items():
        if importlib.util.find_spec(module) is None:
            gpu = "" if device == "cuda" else ", and it runs on a GPU only"
            result.absent[name] = f"{module} is not installed{gpu}"
        elif device != "cuda":
            result.absent[name] = "runs on a GPU only"
        elif module == "liger_kernel":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            result.found[name] = functools.partial(weight_first, LigerFusedLinearCrossEntropyLoss())
        else:
            from cut_cross_entropy import linear_cross_entropy

            result.found[name] = linear_cross_entropy


def why_too_large(name: str, shape: Shape) -> str | None:
    """Why the full logits do not fit this machine; None if they do. A process that was killed could not report it."""
    if shape.device == "cuda" or name not in (EAGER, TORCH_REFERENCE):
        return None
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024 * int(lines["MemAvailable"].split()[0])
    needed = 3 * 4 * shape.n * shape.v  # logits, their softmax and their gradient in float32
    return f"needs about {needed / 2**30:.0f} GiB for its logits" if needed > 0.8 * free else None


def products(hidden: Tensor, weight: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The three matrix products that any fused head must make, the logits standing in for their own gradient."""
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for h, out in zip(hidden.split(chunk), grad_hidden.split(chunk), strict=True):
        logits = h @ weight.T
        torch.mm(logits, weight, out=out)
        grad_weight.addmm_(logits.T, h)
    return grad_hidden, grad_weight


def run_once(loss: Loss | None, inputs: Inputs, shape: Shape) -> None:
    """One forward and backward pass of the loss, with gradients in hidden and weight; None: the products alone."""
    if loss is None:
        with torch.no_grad():
            products(inputs.hidden, inputs.weight, shape.chunk)
        return
    torch.autograd.grad(loss(*inputs), (inputs.hidden, inputs.weight))
