"""What benchmarks/lm_head.py measures: shapes, inputs, implementations, and the accuracy of a solver on those inputs."""

import functools
import importlib.util
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lm_head_plots import OURS, OURS_AGAIN, OURS_CE
from torch import Tensor

from matrix_llm.mce import linear_matrix_cross_entropy, token_mce


class Shape(NamedTuple):
    n: int  # positions
    h: int  # hidden width
    v: int  # vocabulary
    dtype: str
    device: str


SHAPES = {
    "tiny": Shape(256, 128, 2048, "float32", "cpu"),
    "llemma-cpu": Shape(2048, 2048, 32016, "float32", "cpu"),
    "qwen-cpu": Shape(1024, 896, 151936, "float32", "cpu"),
    "llemma-gpu": Shape(8192, 4096, 32016, "bfloat16", "cuda"),
    "qwen-gpu": Shape(16384, 2048, 151936, "bfloat16", "cuda"),
}
EAGER, TORCH_REFERENCE = "torch, eager", "torch linear_cross_entropy, default"
CHUNK_BYTES = {"cpu": 2**28, "cuda": 2**32}  # of float32 logits at a time, wherever this file makes logits itself
SAMPLE_CE = (0.01, 2.0)  # below, value and error are both rounding noise of a confident prediction


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def make_inputs(shape: Shape, device: str, seed: int, mean_ce: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden (N, H), weight (V, H) and labels (N,), like those of a trained model, whose predictions are calibrated.

    Rows of the weight: singular values i^-0.5 over randomly rotated directions, a shared mean direction, log-normal norms.
    Hidden: a mixture of seven rows, drawn Zipf-like, and noise, without the shared direction, and turned a little towards
    the weak directions, which is what makes a trained head's target stand out. One scale, by bisection on a sample, brings
    the mean entropy to `mean_ce`; positions vary about it. Labels are drawn from the prediction itself, so the mean
    cross-entropy is the mean entropy: many certain positions, a wide middle, and a few surprises.
    """
    n, h, v = shape[:3]
    g = torch.Generator(device).manual_seed(seed)
    normal, uniform = (functools.partial(f, generator=g, device=device) for f in (torch.randn, torch.rand))
    rotation = torch.linalg.qr(normal(h, h)).Q
    spectrum = torch.arange(1, h + 1, device=device) ** -0.5
    mean = _unit(normal(h))
    weight = torch.empty(v, h, device=device)
    for rows in weight.split(8192):
        direction = _unit((normal(len(rows), h) * spectrum) @ rotation.T) + 0.4 * mean
        rows.copy_(_unit(direction) * torch.exp(0.2 * normal(len(rows), 1)))
    zipf = 1 / (torch.arange(v, device=device) + 2.7)
    tokens = torch.randperm(v, generator=g, device=device)
    hidden, closeness = 0.3 * _unit(normal(n, h)), uniform(n, 1)
    for rank in range(7):
        strength = closeness * uniform(n, 1) if rank else 1.0
        hidden += strength * _unit(weight[tokens[torch.multinomial(zipf, n, True, generator=g)]])
    hidden -= (hidden @ mean)[:, None] * mean
    hidden = _unit(((hidden @ rotation) * spectrum**-0.25) @ rotation.T) * torch.exp(0.25 * normal(n, 1))
    sample = hidden[:256] @ weight.T
    low, high = 1.0, 1000.0
    for _ in range(16):
        scale = math.sqrt(low * high)
        log_q = (scale * sample).log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1).mean().item()
        low, high = (scale, high) if entropy > mean_ce else (low, scale)
    del sample
    hidden *= scale
    labels = [
        torch.multinomial((rows @ weight.T).softmax(-1), 1, generator=g)[:, 0]
        for rows in hidden.split(chunk_rows(shape))
    ]
    dtype = getattr(torch, shape.dtype)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), torch.cat(labels)


def chunk_rows(shape: Shape) -> int:
    return max(1, min(shape.n, CHUNK_BYTES[shape.device] // (4 * shape.v)))


# ---- implementations

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
    return linear_matrix_cross_entropy(hidden, weight, labels, **kwargs).loss


def later_micro_batches() -> Loss:
    """Ours as the later micro-batches of an optimizer step run it, with the weight's summary made once, at the first call."""
    from matrix_llm.loss.vocabulary import summarise

    made: dict[int, Any] = {}

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if weight.data_ptr() not in made:
            made[weight.data_ptr()] = summarise(weight.detach(), torch.float32)
        return ours(hidden, weight, labels, summary=made[weight.data_ptr()])

    return loss


def _weight_first(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return loss(weight, hidden, labels)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def implementations(device: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """Name -> loss of (hidden, weight, labels), and name -> why it is absent. Optional packages are imported here, if at all."""
    found: dict[str, Loss] = {
        OURS: ours,
        OURS_AGAIN: later_micro_batches(),
        OURS_CE: functools.partial(ours, mce_weight=0.0),
        EAGER: eager,
    }
    absent = {}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions
        found[TORCH_REFERENCE] = F.linear_cross_entropy  # options=None: whole logits, as in eager
        found["torch linear_cross_entropy, auto"] = functools.partial(F.linear_cross_entropy, options=options())
        for size in (256, 1024):
            found[f"torch linear_cross_entropy, chunk {size}"] = functools.partial(
                F.linear_cross_entropy, options=options(batch_chunk_size=size)
            )
    else:
        absent["torch linear_cross_entropy"] = f"needs torch >= 2.13, and this is {torch.__version__}"
    try:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        def trl_head(
            hidden: Tensor, weight: Tensor, labels: Tensor
        ) -> Tensor:  # the cheapest outputs that give the loss
            arguments = (hidden, weight, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
            return -ChunkedLogProbFunction.apply(*arguments)[0].mean()

        found["TRL, chunked head"] = trl_head
    except ImportError as error:
        absent["TRL, chunked head"] = f"not importable ({error})"
    for name, module in {"Liger, fused": "liger_kernel", "Apple, cut-cross-entropy": "cut_cross_entropy"}.items():
        if importlib.util.find_spec(module) is None:
            absent[name] = f"{module} is not installed" + ("" if device == "cuda" else ", and it runs on a GPU only")
        elif device != "cuda":
            absent[name] = "runs on a GPU only"
        elif module == "liger_kernel":
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            found[name] = functools.partial(_weight_first, LigerFusedLinearCrossEntropyLoss())
        else:
            from cut_cross_entropy import linear_cross_entropy

            found[name] = linear_cross_entropy
    return found, absent


def products(hidden: Tensor, weight: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The three matrix products that any fused head must make, the logits standing in for their own gradient."""
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for h, out in zip(hidden.split(chunk), grad_hidden.split(chunk), strict=True):
        logits = h @ weight.T
        torch.mm(logits, weight, out=out)
        grad_weight.addmm_(logits.T, h)
    return grad_hidden, grad_weight


def run_once(loss: Loss | None, inputs: tuple[Tensor, Tensor, Tensor], shape: Shape) -> None:
    hidden, weight, labels = inputs
    if loss is None:
        with torch.no_grad():
            products(hidden, weight, chunk_rows(shape))
        return
    torch.autograd.grad(loss(hidden, weight, labels), (hidden, weight))


# ---- accuracy


def reference(logits: Tensor, labels: Tensor, rows: Tensor, steps: int = 32) -> tuple[Tensor, Tensor]:
    """MCE (C,) and its gradient in the logits (C, V) by Lanczos over the whole vocabulary, orthogonalised twice.

    On purpose not the library's code. Logits (C, V) and unit rows (V, D) in float64.
    """
    q = logits.softmax(-1)
    basis = [rows[labels]]
    seen, t = [], torch.zeros(len(labels), steps, steps, dtype=q.dtype, device=q.device)
    for k in range(steps):
        seen.append(basis[-1] @ rows.T)
        w = (q * seen[-1]) @ rows
        t[:, k, k] = (w * basis[-1]).sum(-1)
        spanned = torch.stack(basis, 1)
        for _ in range(2):
            w = w - torch.bmm(torch.bmm(spanned, w[:, :, None]).mT, spanned)[:, 0]
        beta = w.norm(dim=-1)
        alive = beta > 1e-13
        if k + 1 < steps:
            t[:, k, k + 1] = t[:, k + 1, k] = torch.where(alive, beta, 0.0)
            basis.append(torch.where(alive, 1 / beta.clamp(min=1e-300), 0.0)[:, None] * w)
    empty = t.diagonal(dim1=1, dim2=2) == 0  # the space was exhausted: log 1 = 0 adds nothing
    values, vectors = torch.linalg.eigh(t + torch.diag_embed(empty.to(t.dtype)))
    values = values.clamp(min=1e-18)
    log, first = values.log(), vectors[:, 0]
    gap = values[:, :, None] - values[:, None]
    close = gap.abs() < 1e-9 * values[:, :, None]
    quotient = (log[:, :, None] - log[:, None]) / torch.where(close, 1.0, gap)
    factor = torch.where(close, 1 / values[:, :, None], quotient)
    m = vectors @ (factor * first[:, :, None] * first[:, None]) @ vectors.mT  # Dlog_T[e_1 e_1^T]
    u = torch.stack(seen, 1)  # (C, K, V)
    g = -(u * torch.bmm(m, u)).sum(1)
    return -(first**2 * log).sum(-1), q * (g - (q * g).sum(-1, keepdim=True))


class Truth(NamedTuple):
    sample: Tensor  # (P,) positions
    logits: Tensor  # (P, V) float64
    value: Tensor  # (P,) float64
    gradient: Tensor  # (P, V) float64
    check: list[float]  # relative error of value and gradient against `exact`
    inputs: dict[str, float]  # what the predictions look like


def relative(made: Tensor, true: Tensor) -> float:
    made, true = made.double().reshape(len(true), -1), true.reshape(len(true), -1)
    return ((made - true).norm(dim=1) / true.norm(dim=1)).mean().item()


def truth(inputs: tuple[Tensor, Tensor, Tensor], positions: int, exact_positions: int) -> Truth:
    hidden, weight, labels = (t.detach() for t in inputs)
    parts = [F.log_softmax((h @ weight.T).float(), -1) for h in hidden[:1024].split(128)]
    ce = torch.cat([F.nll_loss(p, y, reduction="none") for p, y in zip(parts, labels[:1024].split(128), strict=True)])
    stats = {
        "mean CE": ce.mean().item(),
        "share with CE <= 2": (ce <= 2).double().mean().item(),
        "mean entropy": sum(-(p.exp() * p).sum().item() for p in parts) / len(ce),
        "top-1 accuracy": torch.cat([p.argmax(-1) for p in parts]).eq(labels[:1024]).double().mean().item(),
        "mass beyond the 128 likeliest": 1 - torch.cat([p.topk(128).values.exp().sum(-1) for p in parts]).mean().item(),
    }
    sample = ((ce > SAMPLE_CE[0]) & (ce <= SAMPLE_CE[1])).nonzero()[:positions, 0]
    if not len(sample):
        raise SystemExit(f"no position of {len(ce)} has a CE in {SAMPLE_CE}; give more with --n.")
    w64 = weight.double()
    rows = _unit(w64)
    logits = hidden[sample].double() @ w64.T
    made = [reference(z, y, rows) for z, y in zip(logits.split(8), labels[sample].split(8), strict=True)]
    value, gradient = torch.cat([m[0] for m in made]), torch.cat([m[1] for m in made])
    errors = []
    for i in range(min(exact_positions, len(sample))):  # the (D, D) logarithm: one position at a time
        z = logits[i : i + 1].clone().requires_grad_()
        exact = token_mce(z, labels[sample[i : i + 1]], rows, solver="exact")
        (grad,) = torch.autograd.grad(exact.sum(), z)
        errors.append([relative(value[i : i + 1], exact.detach()), relative(gradient[i : i + 1], grad)])
    return Truth(sample, logits, value, gradient, [statistics.fmean(e) for e in zip(*errors, strict=True)], stats)


def logits_gradient(
    hidden: Tensor, weight: Tensor, labels: Tensor, ce_gradient: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """MCE's gradient in the logits (P, V) as the fused pass makes it: a zero bias receives it, one position at a time."""
    bias = torch.zeros(len(weight), device=weight.device, requires_grad=True)
    losses = linear_matrix_cross_entropy(hidden, weight, labels, bias=bias, reduction="none", **kwargs).loss
    made = [torch.autograd.grad(losses[i], bias, retain_graph=True)[0].double() for i in range(len(losses))]
    return torch.stack(made) - ce_gradient


def solver_errors(inputs: tuple[Tensor, Tensor, Tensor], true: Truth, kwargs: dict[str, Any]) -> dict[str, float]:
    """Mean relative errors of the value and of its gradient in the logits, both from the pass that is timed."""
    hidden, weight, labels = (t.detach() for t in inputs)
    y = labels[true.sample]
    with torch.no_grad():  # every position, as timed: a solver may share something within a chunk
        value = linear_matrix_cross_entropy(hidden, weight, labels, reduction="none", **kwargs).matrix_cross_entropy[
            true.sample
        ]
    ce_gradient = true.logits.softmax(-1).scatter_add(1, y[:, None], torch.full_like(true.logits[:, :1], -1.0))
    gradient = logits_gradient(hidden[true.sample], weight, y, ce_gradient, kwargs)
    return {"value": relative(value, true.value), "gradient": relative(gradient, true.gradient)}


def solver_settings(kind: str, shape: Shape) -> dict[str, dict[str, Any]]:
    """Every setting explicit: a changed default changes no row but the first. top_k = V is the whole vocabulary."""
    whole: dict[str, Any] = {"top_k": shape.v}
    default: dict[str, dict[str, Any]] = {"the default": {}}
    if kind == "sketch":
        widths = [r for r in (128, 256, 512, 1024) if r < shape.h]
        head = {
            f"top {s}, 6 steps, sketch {r}": {"top_k": s, "steps": 6, "sketch_dim": r} for s in (16, 64) for r in widths
        }
        return (
            default
            | head
            | {f"vocabulary, 3 steps, sketch {r}": {**whole, "steps": 3, "sketch_dim": r} for r in widths}
        )
    steps = {f"vocabulary, {k} steps": {**whole, "steps": k} for k in range(2, 9)}
    head = {f"top {s}, {k} steps": {"top_k": s, "steps": k} for s in (8, 16, 32, 64, 256) for k in (4, 6, 8)}
    return default | steps | head | {"taylor, order 4": {"solver": "taylor", "order": 4}}
