"""Runs the matrix loss inside a causal LM's own forward, where its head is whole under every kind of sharding.

`add_matrix_head(model, ...)` gives the model's forward one more keyword, `matrix_loss=True`:

1. the backbone makes the hidden states; no logits
2. the LM head's weight and bias are gathered (ZeRO-3: emptied outside its module; FSDP2: a DTensor)
3. `linear_matrix_cross_entropy` returns the summed loss with its gradient already made; the vocabulary's summary that its
   solver needs is made once an optimizer step (`HeadState`) and used by every micro-batch of it
4. the gathered weight is released; autograd hands its gradient to the engine like any other

Running the loss outside the forward gives an empty weight under ZeRO-3 and silently wrong gradients under FSDP2.

Legend: B batch, T sequence, N = B (T - 1) positions, V vocabulary, H hidden width, D embedding width.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from matrix_llm.information import effective_rank
from matrix_llm.loss.head_tail import VocabularySummary, summarise
from matrix_llm.loss.solvers import Solver, unit_rows
from matrix_llm.mce import TrainedPositions, linear_matrix_cross_entropy


@dataclass(frozen=True)
class MatrixLossOptions:
    """What `linear_matrix_cross_entropy` is asked for, and where its embeddings come from."""

    mce_weight: float
    solver: str
    steps: int | None
    order: int
    sketch_dim: int | None
    top_k: int | None
    embeddings: str  # "lm_head", "input", or the path of a .safetensors file
    embedding_grad: bool


@dataclass
class MatrixCausalLMOutput(ModelOutput):
    """Output of `model(..., labels=labels, matrix_loss=True)`. Per-position fields are detached, zero at label -100.

    Args:
        loss_sum (`torch.Tensor`): CE + mce_weight * MCE summed over the positions that count; carries the gradient.
        cross_entropy, matrix_cross_entropy, entropy (`torch.Tensor` of shape `(B, T - 1)`): nats.
        is_top1, label_mask (`torch.Tensor` of shape `(B, T - 1)`): bool.
        aux_loss (`torch.Tensor`, *optional*): a mixture of experts' load-balancing loss.
    """

    loss_sum: Tensor | None = None
    cross_entropy: Tensor | None = None
    matrix_cross_entropy: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) that a model applies to its logits before the softmax, from its config.

    Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, Granite divides by `logits_scaling`
    (HyperCLOVA X multiplies by it), Gemma caps with `final_logit_softcapping`. `check_head` proves the result.
    """
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(text, name, None)
        if value is not None:
            return float(value), softcap
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    return float(scaling if text.model_type == "hyperclovax" else 1 / scaling), softcap


def _output_head(model: PreTrainedModel) -> Any:
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ValueError(
            f"{type(model).__name__} has no LM head with a weight (get_output_embeddings() gave {type(head).__name__}), "
            "so there is nothing to read token vectors from. Use a causal language model."
        )
    return head


def _whole(parameter: DTensor) -> Tensor:
    """Where FSDP2 shards the head as a unit of its own (PEFT's copy under modules_to_save, a wrap policy that names its class), nothing but
    this unshards it, and nothing but this averages its gradient over the processes: full_tensor() alone would keep each one's own slice."""
    mesh = parameter.device_mesh
    whole = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


@contextlib.contextmanager
def gathered(*parameters: Any) -> Iterator[list[Any]]:
    """The parameters whole: ZeRO-3 partitions gathered for the block, FSDP2 DTensors as full, differentiable tensors."""
    with maybe_gather_lm_head_ctx(*parameters):
        yield [_whole(p) if isinstance(p, DTensor) else p for p in parameters]


def head_effective_rank(model: PreTrainedModel) -> float:
    """Effective rank of the second moment of the LM head's unit rows, between 1 (collapsed) and D (isotropic).

    A collective under ZeRO-3 and FSDP2: call it on every rank.
    """
    with torch.no_grad(), gathered(_output_head(model).weight) as (weight,):
        rows = unit_rows(weight.detach(), dtype=torch.float32)
        return effective_rank(rows.T @ rows / rows.shape[0]).item()


def _load_embeddings(path: str) -> Tensor:
    from safetensors.torch import load_file

    tensors = load_file(Path(path))
    if any(not torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError(f"mce_embeddings={path!r} holds NaN or infinity. Save finite vectors.")
    if len(tensors) != 1:
        raise ValueError(
            f"mce_embeddings={path!r} holds {sorted(tensors)}, but one (V, D) tensor is needed. Save it alone."
        )
    return next(iter(tensors.values()))


def check_head(model: PreTrainedModel) -> None:
    """Prove on a few tokens that backbone, head, scale and cap give the model's own logits.

    A model that does more between its backbone and its logits than this file knows would train on a wrong q in silence.
    Skipped where the weights are not here (ZeRO-3 partitions, meta tensors).

    Raises:
        ValueError: the logits differ.
    """
    head = _output_head(model)
    if any(p.is_meta or p.numel() == 0 or isinstance(p, DTensor) for p in model.parameters()):
        return
    scale, softcap = logit_transform(model.config)
    vocabulary = head.weight.shape[0]
    ids = torch.arange(8, device=model.device).unsqueeze(0) * 7 % vocabulary
    modes = {module: module.training for module in model.modules()}
    attention = model.config._attn_implementation
    model.eval()
    if "flash" in str(attention):  # it takes neither float32 nor the CPU, and has no part in what is proved here
        model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits[0].float()
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            logits = (
                nn.functional.linear(hidden.to(head.weight.device), head.weight, getattr(head, "bias", None)).float()
                * scale
            )
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
    finally:
        for module, mode in modes.items():
            module.training = mode
        if "flash" in str(attention):
            model.set_attn_implementation(attention)
    if not torch.isfinite(expected).all():
        return  # broken weights are another matter: the trainer's guard names the step and the rows
    error = (logits.to(expected.device) - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    if not error <= tolerance:
        raise ValueError(
            f"{type(model).__name__} does something to its logits that matrix_llm does not know: scale {scale} and soft-cap "
            f"{softcap} reproduce them only to a relative {error.item():.2g}. The loss would be of the wrong distribution. "
            "Set mce_weight: 0, or add the model's rule to matrix_llm.model.lm_head.logit_transform."
        )


def _load_balancing_loss(text_config: PretrainedConfig, router_logits, attention_mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(text_config, "num_experts", None) or text_config.num_local_experts
    return load_balancing_loss_func(router_logits, experts, text_config.num_experts_per_tok, attention_mask)  # type: ignore[return-value]


class HeadState:
    """What whoever steps the optimizer may set, and the vocabulary's summary (head_tail.py), shared by the micro-batches of one step.

    `step` is anything that changes whenever the weights do; with None, the default, every call reads the weight anew. `mce_weight` starts
    as that of the options.
    """

    def __init__(self, options: MatrixLossOptions) -> None:
        self.step: object = None
        self.mce_weight = options.mce_weight
        self._options = options
        self._made_at: object = None
        self._summary: VocabularySummary | None = None

    def summary_of(self, embeddings: Tensor, dtype: torch.dtype) -> VocabularySummary | None:
        """None where the solver needs none, or where `linear_matrix_cross_entropy` must make it (a sketch, trained embeddings)."""
        options = self._options
        solver = Solver.create(
            options.solver,
            vocabulary=embeddings.shape[0],
            steps=options.steps,
            order=options.order,
            sketch_dim=options.sketch_dim,
            top_k=options.top_k,
            fused=not embeddings.requires_grad,
        )
        if solver.top_k is None or solver.sketch_dim is not None or embeddings.requires_grad:
            return None
        made_at = (self.step, embeddings.shape, embeddings.dtype, embeddings.device, dtype)
        if self._summary is None or self.step is None or made_at != self._made_at:
            self._summary = summarise(embeddings, torch.float64 if dtype == torch.float64 else torch.float32)
            self._made_at = made_at
        return self._summary


def add_matrix_head(model: PreTrainedModel, options: MatrixLossOptions) -> HeadState:
    """Teach `model.forward` the keyword `matrix_loss=True`, which returns a `MatrixCausalLMOutput` and makes no logits.

    Without the keyword the forward is untouched. Call it on the base model, before DDP, FSDP or DeepSpeed wrap it.
    Under torch.compile the backbone is compiled, the loss is not.

    Returns:
        What may be set between two steps; it also holds what the solver reads from the weight.

    Raises:
        ValueError: no LM head; an embedding file that does not fit; a model whose logits this file cannot reproduce.
    """
    head = _output_head(model)
    check_head(model)
    original_forward = model.forward
    text_config = model.config.get_text_config()
    scale, softcap = logit_transform(model.config)
    vocabulary = text_config.vocab_size
    fixed = None
    if options.embeddings not in ("lm_head", "input"):
        fixed = _load_embeddings(options.embeddings)
        rows = head.weight.shape[0] if head.weight.numel() else vocabulary
        if fixed.ndim != 2 or fixed.shape[0] != rows:
            raise ValueError(
                f"mce_embeddings={options.embeddings!r} is {tuple(fixed.shape)}, but the model's head has {rows} rows: "
                f"it must be ({rows}, D)."
            )

    state = HeadState(options)

    @functools.partial(torch.compiler.disable, recursive=False)
    def matrix_forward(
        self: PreTrainedModel, labels: Tensor | None, shift_labels: Tensor | None, kwargs: dict
    ) -> MatrixCausalLMOutput:
        nonlocal fixed
        kwargs["use_cache"] = False
        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        lm_head = _output_head(self)  # looked up anew: PEFT and FSDP replace it after this function ran
        shifted_here = shift_labels is None
        if shift_labels is None:
            if labels is None:
                raise ValueError("matrix_loss=True needs labels, or shift_labels.")
            shift_labels = labels[:, 1:]
        rows = getattr(lm_head.weight, "ds_shape", lm_head.weight.shape)[
            0
        ]  # ZeRO-3 leaves an empty weight with its shape beside
        trained = TrainedPositions(
            shift_labels.reshape(-1), rows
        )  # before the backbone, so that the host need not wait after it
        backbone = self.base_model(**kwargs)
        hidden = backbone.last_hidden_state  # (B, T, H)
        if shifted_here:
            hidden = hidden[:, :-1]
        wanted = [lm_head.weight, getattr(lm_head, "bias", None)]
        if options.embeddings == "input":
            wanted.append(self.get_input_embeddings().weight)
        with gathered(*wanted) as (weight, bias, *more):
            if fixed is not None:
                fixed = fixed.to(weight.device)
                embeddings = fixed
            else:
                embeddings = more[0] if more else weight
            if not options.embedding_grad:
                embeddings = embeddings.detach()
            hidden, shift_labels = hidden.to(weight.device), shift_labels.to(weight.device)
            out = linear_matrix_cross_entropy(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                shift_labels.reshape(-1),
                bias=bias,
                embeddings=embeddings,
                mce_weight=state.mce_weight,
                solver=options.solver,
                steps=options.steps,
                order=options.order,
                sketch_dim=options.sketch_dim,
                top_k=options.top_k,
                logit_scale=scale,
                softcap=softcap,
                reduction="sum",
                summary=state.summary_of(embeddings, hidden.dtype),
                trained=trained,
            )
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = _load_balancing_loss(text_config, backbone.router_logits, kwargs.get("attention_mask"))
        shape = shift_labels.shape
        return MatrixCausalLMOutput(
            loss_sum=out.loss,
            cross_entropy=out.cross_entropy.view(shape),
            matrix_cross_entropy=out.matrix_cross_entropy.view(shape),
            entropy=out.entropy.view(shape),
            is_top1=out.is_top1.view(shape),
            label_mask=shift_labels != -100,
            aux_loss=aux_loss,
        )

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(self: PreTrainedModel, *args, matrix_loss: bool = False, **kwargs):
        if not matrix_loss:
            return original_forward(*args, **kwargs)
        if args:
            raise TypeError("matrix_loss=True takes keyword arguments only.")
        kwargs.pop("num_items_in_batch", None)
        return matrix_forward(self, kwargs.pop("labels", None), kwargs.pop("shift_labels", None), kwargs)

    model.forward = types.MethodType(forward, model)
    model._matrix_head_state = state  # type: ignore[assignment]  # which the forward now follows
    return state
