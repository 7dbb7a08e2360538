"""The matrix loss inside a causal LM's own forward, where its LM head can be gathered under every kind of sharding.

`add_matrix_head(model, settings)` gives the model's forward one more keyword, `matrix_loss=True`:

1. the backbone computes the hidden states; no logits
2. the LM head's weight and bias are gathered (ZeRO-3 empties them outside their module; FSDP2 makes them DTensors)
3. `linear_loss` returns the summed loss, with its gradient already computed
4. the gathered weight is released; autograd passes its gradient to the engine like any other

Outside the forward the weight would be empty under ZeRO-3, and the gradients silently wrong under FSDP2.

Legend: B batch, T sequence, N = B (T - 1) positions, V vocabulary, H hidden width, D embedding width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from matrix_llm.base.errors import ModelError, RecipeError
from matrix_llm.base.modes import evaluation_mode
from matrix_llm.information import effective_rank
from matrix_llm.loss.linear import linear_loss
from matrix_llm.loss.positions import TrainedPositions
from matrix_llm.loss.settings import EMBEDDINGS, LossSettings
from matrix_llm.loss.teachers import Teacher
from matrix_llm.loss.vocabulary import VocabularySummary, summarise, unit_vectors


@dataclass
class MatrixCausalLMOutput(ModelOutput):
    """Output of `model(..., labels=labels, matrix_loss=True)`. Per-position fields are detached, and 0 at label -100.

    Args:
        loss_sum (`torch.Tensor`): the token loss + mce_weight * MCE, summed over the positions that count; carries
            the gradient.
        cross_entropy, matrix_cross_entropy, token_loss, floor, entropy (`torch.Tensor` of shape `(B, T - 1)`): nats.
        is_top1, label_mask (`torch.Tensor` of shape `(B, T - 1)`): bool.
        aux_loss (`torch.Tensor`, *optional*): a mixture of experts' load-balancing loss.
    """

    loss_sum: Tensor | None = None  # ()
    cross_entropy: Tensor | None = None  # (B, T - 1)
    matrix_cross_entropy: Tensor | None = None  # (B, T - 1)
    token_loss: Tensor | None = None  # (B, T - 1) the value of the loss that MCE is added to
    floor: Tensor | None = None  # (B, T - 1) the part of it that no student can lower
    entropy: Tensor | None = None  # (B, T - 1) of the predicted distribution
    is_top1: Tensor | None = None  # (B, T - 1) the label is the likeliest token
    label_mask: Tensor | None = None  # (B, T - 1) the position counts
    aux_loss: Tensor | None = None  # (); None for a model without experts


# ------------------------------------------------------------------------------------------------------- the LM head


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


def lm_head_of(model: PreTrainedModel) -> Any:
    """The module that turns hidden states into logits.

    Raises:
        ModelError: there is none with a weight.
    """
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        raise ModelError(
            f"{type(model).__name__} has no LM head with a weight (get_output_embeddings() gave "
            f"{type(head).__name__}), so there are no token vectors to read. Use a causal language model."
        )
    return head


@contextlib.contextmanager
def gathered(*parameters: Any) -> Iterator[list[Any]]:
    """The full parameters: ZeRO-3 partitions are gathered for the block, FSDP2 DTensors become full, differentiable
    tensors."""
    with maybe_gather_lm_head_ctx(*parameters):
        yield [_unshard(p) if isinstance(p, DTensor) else p for p in parameters]


def _unshard(parameter: DTensor) -> Tensor:
    """The full tensor, with a gradient averaged over the processes.

    Needed where FSDP2 shards the LM head as a separate unit (PEFT's copy under modules_to_save, or a wrap policy that
    names its class): nothing else unshards it, and nothing else averages its gradient. `full_tensor()` alone would keep
    each process's own slice.
    """
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full


def head_effective_rank(model: PreTrainedModel) -> float:
    """Effective rank of the second moment of the LM head's unit vectors, from 1 (collapsed) to D (isotropic).

    A collective under ZeRO-3 and FSDP2: call it on every rank.
    """
    with torch.no_grad(), gathered(lm_head_of(model).weight) as (weight,):
        vectors = unit_vectors(weight.detach(), dtype=torch.float32)
        return effective_rank(vectors.T @ vectors / vectors.shape[0]).item()


@contextlib.contextmanager
def _without_flash_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch off flash attention, which supports neither float32 nor the CPU, and which `check_head` does not test."""
    attention = model.config._attn_implementation
    is_flash = "flash" in str(attention)
    if is_flash:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if is_flash:
            model.set_attn_implementation(attention)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Verify on a few tokens that backbone, LM head, scale and cap give the model's own logits.

    A model that does more between its backbone and its logits than `logit_transform` knows would silently train on a
    wrong q. Skipped where the weights are not available (ZeRO-3 partitions, meta tensors).

    Raises:
        ModelError: there is no LM head, or the logits differ.
    """
    head = lm_head_of(model)
    if any(p.is_meta or p.numel() == 0 or isinstance(p, DTensor) for p in model.parameters()):
        return
    scale, softcap = logit_transform(model.config)

    # 1. the model's own logits, and ours
    ids = torch.arange(8, device=model.device).unsqueeze(0) * 7 % head.weight.shape[0]
    with evaluation_mode(model), _without_flash_attention(model):
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        bias = getattr(head, "bias", None)
        logits = nn.functional.linear(hidden.to(head.weight.device), head.weight, bias).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)

    # 2. equal, up to rounding in the weights' dtype
    if not torch.isfinite(expected).all():
        return  # broken weights are a different problem: the trainer's guard names the step and the rows
    error = (logits.to(expected.device) - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 5e-2
    if not error <= tolerance:
        raise ModelError(
            f"{type(model).__name__} does something to its logits that matrix_llm does not know: scale {scale} and "
            f"soft-cap {softcap} reproduce them only to a relative {error.item():.2g}, so the loss would be that of "
            "another distribution. Set mce_weight: 0, or add the model's rule to "
            "matrix_llm.model.lm_head.logit_transform."
        )


# -------------------------------------------------------------------------------------------------- the token vectors


def load_embeddings(path: str, vocabulary_size: int) -> Tensor:
    """The (V, D) token vectors of a .safetensors file."""
    try:
        tensors = load_file(Path(path).expanduser())
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"mce_embeddings={path!r} cannot be read: {error}. Give a .safetensors file with one (V, D) tensor."
        ) from None
    if len(tensors) != 1:
        raise RecipeError(
            f"mce_embeddings={path!r} holds {sorted(tensors)}, but one (V, D) tensor is needed. Save it alone."
        )
    (embeddings,) = tensors.values()
    if not embeddings.is_floating_point():
        raise RecipeError(f"mce_embeddings={path!r} holds {embeddings.dtype}. Save vectors of floating-point numbers.")
    if not torch.isfinite(embeddings).all():
        raise RecipeError(f"mce_embeddings={path!r} holds NaN or infinity. Save finite vectors.")
    if embeddings.ndim != 2 or embeddings.shape[0] != vocabulary_size:
        raise ModelError(
            f"mce_embeddings={path!r} is {tuple(embeddings.shape)}, but the model has {vocabulary_size} tokens: it "
            f"must be ({vocabulary_size}, D)."
        )
    return embeddings


# ------------------------------------------------------------------------------------------- the loss, in the forward


class FrozenHead:
    """The LM head of a model that is not trained here, with what that model does to its logits.

    Args:
        model: it, or with PEFT the one that is trained: then the head as it was before the adapters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._scale, self._softcap = logit_transform(model.config)

    def parameters(self) -> list[Any]:
        """Weight and bias, to be gathered."""
        head = lm_head_of(self._model)
        head = getattr(head, "original_module", head)  # PEFT trains a copy of it
        return [head.weight, getattr(head, "bias", None)]

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary_size: int) -> Teacher:
        """The teacher of these hidden states (B, T, H). Vectors beyond the student's vocabulary are padding."""
        weight, bias = weight[:vocabulary_size], None if bias is None else bias[:vocabulary_size]
        hidden = hidden.reshape(-1, hidden.shape[-1]).to(weight.device)
        return Teacher(hidden.detach(), weight.detach(), bias, self._scale, self._softcap)


class MatrixHead:
    """What `model.forward(..., matrix_loss=True)` runs, and what it remembers between micro-batches.

    Args:
        model: the base model, not yet wrapped by DDP, FSDP or DeepSpeed.
        settings: the loss and its solver.

    Raises:
        ModelError, RecipeError: an embedding file that cannot be read or does not fit the model.
    """

    mce_weight: float
    """The current weight of MCE. It starts at the settings' weight, and the trainer changes it during warmup."""

    step: object
    """Any value that changes with the weights. The vocabulary's summary is cached until it changes; None: never."""

    own_scale: float
    """ntl only: trained positions / those whose label is a number, over the batch whose loss is divided together."""

    teacher: FrozenHead | None
    """The LM head of the model whose distribution is the target, where there is one."""

    def __init__(self, model: PreTrainedModel, settings: LossSettings) -> None:
        self.mce_weight = settings.mce_weight
        self.step = None
        self.own_scale = 1.0
        self.teacher = None
        self._settings = settings
        self._text_config = model.config.get_text_config()
        self._scale, self._softcap = logit_transform(model.config)
        self._from_file: Tensor | None = None  # (V, D)
        if settings.embeddings not in EMBEDDINGS:
            weight = lm_head_of(model).weight
            vocabulary_size = weight.shape[0] if weight.numel() else self._text_config.vocab_size  # empty under ZeRO-3
            self._from_file = load_embeddings(settings.embeddings, vocabulary_size)
        self._summary: VocabularySummary | None = None
        self._summarised: object = None  # what the summary was computed from

    @functools.partial(torch.compiler.disable, recursive=False)  # the backbone is compiled, the loss is not
    def forward(
        self,
        model: PreTrainedModel,
        labels: Tensor | None,  # (B, T), or
        shift_labels: Tensor | None,  # (B, T - 1), already shifted
        inputs: dict[str, Any],  # of the backbone: input_ids (B, T) and so on
        teacher_hidden: Tensor | None = None,  # (B, T, H') hidden states of the teacher, of the same inputs
    ) -> MatrixCausalLMOutput:
        """The summed loss of a micro-batch. Without a trained position it is a zero still connected to the graph."""
        # 1. labels. Before the backbone, so that the host need not wait after it to know how many positions count.
        labels_are_shifted = shift_labels is not None
        if shift_labels is None:
            if labels is None:
                raise ValueError("matrix_loss=True needs labels, or shift_labels.")
            shift_labels = labels[:, 1:]
        head = lm_head_of(model)  # looked up at every call: PEFT and FSDP replace the module after add_matrix_head
        # Under ZeRO-3 the weight is empty, with its true shape in an attribute.
        vocabulary_size = getattr(head.weight, "ds_shape", head.weight.shape)[0]
        trained = TrainedPositions(shift_labels.reshape(-1), vocabulary_size)

        # 2. backbone
        inputs["use_cache"] = False
        if getattr(self._text_config, "output_router_logits", False):
            inputs.setdefault("output_router_logits", True)
        backbone = model.base_model(**inputs)
        hidden = backbone.last_hidden_state  # (B, T, H)
        if not labels_are_shifted:
            hidden = hidden[:, :-1]

        # 3. LM head and loss
        wanted = [head.weight, getattr(head, "bias", None)]
        if self._settings.embeddings == "input":
            wanted.append(model.get_input_embeddings().weight)
        of_teacher = [] if teacher_hidden is None or self.teacher is None else self.teacher.parameters()
        with gathered(*wanted, *of_teacher) as tensors:
            weight, bias, *input_embeddings = tensors[: len(wanted)]
            embeddings = self._embeddings(weight, *input_embeddings)
            hidden, shift_labels = hidden.to(weight.device), shift_labels.to(weight.device)
            teacher = None
            if teacher_hidden is not None and self.teacher is not None:
                if not labels_are_shifted:
                    teacher_hidden = teacher_hidden[:, :-1]
                of_weight, of_bias = tensors[len(wanted) :]
                teacher = self.teacher.of(teacher_hidden, of_weight, of_bias, vocabulary_size)
            out = linear_loss(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                shift_labels.reshape(-1),
                dataclasses.replace(self._settings, mce_weight=self.mce_weight),
                embeddings=embeddings,
                bias=bias,
                logit_scale=self._scale,
                softcap=self._softcap,
                reduction="sum",
                summary=self._cached_summary(embeddings, hidden.dtype),
                trained=trained,
                own_scale=self.own_scale,
                teacher=teacher,
            )

        # 4. a mixture of experts has its own auxiliary loss
        aux_loss = None
        if inputs.get("output_router_logits"):
            aux_loss = _load_balancing_loss(self._text_config, backbone.router_logits, inputs.get("attention_mask"))
        shape = shift_labels.shape
        return MatrixCausalLMOutput(
            loss_sum=out.loss,
            cross_entropy=out.cross_entropy.view(shape),
            matrix_cross_entropy=out.matrix_cross_entropy.view(shape),
            token_loss=out.value.view(shape),
            floor=out.floor.view(shape),
            entropy=out.entropy.view(shape),
            is_top1=out.is_top1.view(shape),
            label_mask=shift_labels != -100,
            aux_loss=aux_loss,
        )

    def _embeddings(
        self,
        weight: Tensor,  # (V, H) of the LM head
        input_embeddings: Tensor | None = None,  # (V, H)
    ) -> Tensor:
        """The token vectors of MCE, (V, D); detached unless the settings train them. The loss centres them."""
        if self._from_file is not None:
            self._from_file = self._from_file.to(weight.device)  # moved once, then stays there
            return self._from_file
        embeddings = weight if input_embeddings is None else input_embeddings
        return embeddings if self._settings.embedding_grad else embeddings.detach()

    def _cached_summary(self, embeddings: Tensor, dtype: torch.dtype) -> VocabularySummary | None:
        """The summary of the embeddings, computed at the first micro-batch of a step.

        None if the solver needs none, or if `linear_loss` must make it itself (a sketch, trained embeddings).
        """
        trains = embeddings.requires_grad
        solver = self._settings.solver_for(embeddings.shape[0], choose_top_k=not trains)
        if solver.top_k is None or solver.sketch_dim is not None or trains:
            return None
        source = (self.step, embeddings.shape, embeddings.dtype, embeddings.device, dtype)
        if self._summary is None or self.step is None or source != self._summarised:
            dtype = torch.float64 if dtype == torch.float64 else torch.float32
            self._summary = summarise(embeddings, dtype, solver.centred)
            self._summarised = source
        return self._summary


def _load_balancing_loss(text_config: PretrainedConfig, router_logits, attention_mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(text_config, "num_experts", None) or text_config.num_local_experts
    loss = load_balancing_loss_func(router_logits, experts, text_config.num_experts_per_tok, attention_mask)
    assert isinstance(loss, Tensor)  # it is the integer 0 if the model gave no router logits
    return loss


def add_matrix_head(model: PreTrainedModel, settings: LossSettings) -> MatrixHead:
    """Teach `model.forward` the keyword `matrix_loss=True`, which returns a `MatrixCausalLMOutput` without logits.

    Another, `hidden_only=True`, returns the backbone's hidden states alone: those of a teacher, or of a reference.
    Without the keywords the forward is unchanged. Call this on the base model, before DDP, FSDP or DeepSpeed wraps it.
    The forward runs `model._matrix_head`. A second call replaces it; it may be set to an earlier one again.

    Returns:
        The `MatrixHead`, whose `step` and `mce_weight` the trainer sets at each step.

    Raises:
        ModelError: no LM head; a model whose logits `logit_transform` does not reproduce; an embedding file that does
            not fit.
        RecipeError: an embedding file that cannot be read.

    >>> out = model(input_ids=ids, labels=ids, matrix_loss=True)  # doctest: +SKIP
    >>> (out.loss_sum / out.label_mask.sum()).backward()  # doctest: +SKIP
    """
    check_head(model)
    matrix_head = MatrixHead(model, settings)
    original_forward = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against the signature
    def forward(
        self: PreTrainedModel,
        *args,
        matrix_loss: bool = False,
        hidden_only: bool = False,
        teacher_hidden=None,
        **kwargs,
    ):
        if not matrix_loss and not hidden_only:
            return original_forward(*args, **kwargs)
        if args:
            raise TypeError("matrix_loss=True and hidden_only=True take keyword arguments only.")
        kwargs.pop("num_items_in_batch", None)
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if hidden_only:
            return self.base_model(**kwargs | {"use_cache": False}).last_hidden_state
        head: Any = self._matrix_head  # that of the trainer whose turn it is
        return head.forward(self, labels, shift_labels, kwargs, teacher_hidden)

    model.forward = types.MethodType(forward, model)
    model._matrix_head = matrix_head  # type: ignore[assignment]
    return matrix_head
