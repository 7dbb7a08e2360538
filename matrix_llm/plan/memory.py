"""Memory per GPU, estimated before a weight is loaded: without sharding, for each ZeRO stage and for FSDP2.

Legend:
    n   parameters, tied ones once, adapters included       g   processes, one on each GPU
    t   those that are trained                              c   bytes of a number in the forward pass: 2 under bf16
    q   those held in 4 bits (QLoRA) or 8, at `QUANTISED`       or fp16, else 4
        bytes
                                                            m   bytes of a master weight: 2 for `dtype: bfloat16`,
                                                                else 4

In bytes, after Rajbhandari et al. 2020 (section 3), with what DeepSpeed and FSDP2 hold besides (q left out):

                no sharding   ZeRO-1        ZeRO-2        ZeRO-3        FSDP2
    weights     m n           c n           c n           c n / g       m n / g
    copies      2 t (*)       4 t / g       4 t / g       4 t / g       -             (*) under autocast; else none
    gradients   m t           c t           c t / g       c t / g       m t / g
    optimizer   2 m t         8 t / g       8 t / g       8 t / g       2 m t / g     AdamW's two moments
    buffers     m t (DDP)     buckets       buckets       bucket, gathered layers     one layer, gathered twice, and the
                                                                                      embeddings

    activations a layer's input for each token with gradient checkpointing, and one layer in full; without it, every
                layer in full: 11 hidden + 4 intermediate numbers a token, as the Llama layer of transformers keeps them
    LM head     the float32 gradient of its weight, and one chunk of logits (the gathered weight is under buffers)

DeepSpeed also flattens its partition's gradients into a float32 copy for the step (4 t / g, under buffers). Its buckets
hold 500 million numbers whatever the model's size, unless its config says otherwise. docs/training.md compares the
estimate with measured peaks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.training_args import OptimizerNames

from matrix_llm.base.gpus import GIB, GPUS, usable
from matrix_llm.config import Recipe
from matrix_llm.mce import CHUNK_BYTES
from matrix_llm.model.adapters import add_adapters, lora_config
from matrix_llm.model.teacher import read_teacher_config

ENGINES = ("no sharding", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
SHARDED = ("ZeRO-3", "FSDP2")  # the weights themselves, a teacher's as well
BUCKET = 500_000_000  # numbers; DeepSpeed's default
MAX_LIVE = 1_000_000_000  # gathered numbers that ZeRO-3 keeps at a time, by default
# bytes a number: half a byte and the doubly quantised scales, or a byte and one scale for each row
QUANTISED = {None: 0.0, "load_in_4bit": 0.53, "load_in_8bit": 1.0}
PARTS = ("weights", "copies", "gradients", "optimizer", "activations", "lm_head", "buffers", "teacher")


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated bytes per GPU."""

    engine: str
    """One of `ENGINES`."""

    weights: float
    """The weights that the forward pass reads."""

    copies: float
    """The same weights in another precision: float32 under DeepSpeed, half precision under autocast."""

    gradients: float
    """Gradients of the trained weights."""

    optimizer: float
    """The optimizer's moments."""

    activations: float
    """What the forward pass keeps for the backward pass."""

    lm_head: float
    """The gradient of the LM head, and one chunk of logits."""

    buffers: float
    """Communication: buckets, and temporarily gathered weights."""

    teacher: float = 0.0
    """The weights of the teacher that a token loss reads; ZeRO-3 and FSDP2 shard them too."""

    @property
    def state(self) -> float:
        """What lasts from step to step: weights, copies, gradients, optimizer."""
        return self.weights + self.copies + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.state + self.activations + self.lm_head + self.buffers + self.teacher

    def line(self, gpu: str | None = None) -> str:
        """The estimate in words, and whether it fits `gpu`; without `gpu`, the smallest GPU that it fits."""
        parts = [f"{name.replace('_', ' ')} {getattr(self, name) / GIB:.2f}" for name in PARTS if getattr(self, name)]
        if gpu is not None:
            verdict = "fits" if self.total <= usable(gpu) else "DOES NOT FIT"
        else:
            fitting = [f"fits {name}" for name in sorted(GPUS, key=usable) if self.total <= usable(name)]
            verdict = fitting[0] if fitting else "fits none of the known GPUs"
        return f"{self.engine:12} {self.total / GIB:8.2f} GiB = {' + '.join(parts)}: {verdict}"


# --------------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a model, tied ones counted once."""

    total: int
    """All, adapters included."""

    trained: int
    """Those with a gradient."""

    layer: int
    """Those of the largest decoder layer, which FSDP2 gathers as one."""

    embeddings: int
    """Those of the token embeddings and the LM head together."""

    linear: int
    """Those of the linear layers except the LM head: what QLoRA holds in 4 bits."""

    head: int
    """Those of the LM head, if it is trained; else 0."""


def count_parameters(recipe: Recipe, config: PretrainedConfig) -> ParameterCounts:
    """Counted on the model that will train, adapters and lora_modules_to_save included, built without its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        layers = [layer for module in model.modules() if isinstance(module, torch.nn.ModuleList) for layer in module]
        largest = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)
        vectors = {module.weight for module in (embeddings, head) if module is not None}  # one if they are tied
        linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
        if (adapters := lora_config(recipe.model)) is not None:
            add_adapters(model, adapters)  # in place
    parameters = list(model.parameters())  # each tied one once
    trained_head = {p for p in getattr(model.get_output_embeddings(), "parameters", list)() if p.requires_grad}
    return ParameterCounts(
        total=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        layer=largest,
        embeddings=sum(p.numel() for p in vectors),
        linear=sum(p.numel() for p in linear),
        head=sum(p.numel() for p in trained_head),
    )


# ------------------------------------------------------------------------------------------------------- the estimate


@dataclass(frozen=True)
class Sizes:
    """The inputs of every engine's estimate."""

    count: ParameterCounts
    """n, t and the sizes of the model's parts."""

    quantised: int
    """q: parameters held in 4 or 8 bits."""

    quantised_bytes: float
    """Bytes of each of them."""

    processes: int
    """g, at least 1."""

    compute_bytes: int
    """c: 2 or 4."""

    master_bytes: int
    """m: 2 or 4."""

    is_half: bool
    """Whether the forward pass runs in bf16 or fp16."""

    is_checkpointed: bool
    """Whether gradient checkpointing is on."""

    optim: str
    """The recipe's `optim`, e.g. "adamw_torch"."""

    activations: float
    """Bytes kept for the backward pass."""

    lm_head: float
    """Bytes of the LM head's gradient and of one chunk of logits."""

    bucket: int
    """Numbers in one of DeepSpeed's reduction buckets."""

    has_two_buckets: bool
    """Whether DeepSpeed fills one bucket while it sends the other."""

    def weight_bytes(self, bytes_per_weight: int) -> float:
        return bytes_per_weight * (self.count.total - self.quantised) + self.quantised_bytes * self.quantised

    def moment_bytes(self, bytes_per_moment: int) -> float:
        """The optimizer's state for all trained parameters."""
        if self.optim in ("sgd", "adafactor"):
            return 0.0
        return (1 if "8bit" in self.optim else bytes_per_moment) * 2 * self.count.trained


def plan_memory(recipe: Recipe, config: PretrainedConfig, length: int, processes: int) -> list[MemoryPlan]:
    """One estimate for each engine. QLoRA has none for ZeRO-3 and FSDP2, which cannot shard quantised weights.

    Args:
        length: tokens in a row of a micro-batch.
        processes: GPUs, one process on each.
    """
    sizes = _sizes(recipe, config, length, processes)
    plans = [_plan_unsharded(sizes), _plan_zero(sizes, 1), _plan_zero(sizes, 2)]
    if recipe.model.quantised_by is None:
        plans += [_plan_zero(sizes, 3), _plan_fsdp2(sizes)]
    teacher = _teacher_bytes(recipe)
    return [replace(plan, teacher=teacher / (processes if plan.engine in SHARDED else 1)) for plan in plans]


def _teacher_bytes(recipe: Recipe) -> float:
    training = recipe.training
    if training.teacher_model_name_or_path is None:
        return 0.0
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read_teacher_config(training))
    half = training.bf16 or recipe.model.dtype in ("bfloat16", "float16")
    return (2 if half else 4) * sum(p.numel() for p in model.parameters())


def _sizes(recipe: Recipe, config: PretrainedConfig, length: int, processes: int) -> Sizes:
    training, model = recipe.training, recipe.model
    count = count_parameters(recipe, config)
    is_half = bool(training.bf16 or training.fp16)
    compute_bytes = 2 if is_half else 4
    master_bytes = 2 if model.dtype in ("bfloat16", "float16") else 4

    activations, logits = _activations(recipe, config, length, compute_bytes, master_bytes)
    bucket, has_two_buckets = _buckets(training.deepspeed)
    return Sizes(
        count=count,
        quantised=count.linear if model.quantised_by else 0,
        quantised_bytes=QUANTISED[model.quantised_by],
        processes=processes,
        compute_bytes=compute_bytes,
        master_bytes=master_bytes,
        is_half=is_half,
        is_checkpointed=bool(training.gradient_checkpointing),
        optim=OptimizerNames(training.optim).value,
        activations=activations,
        lm_head=logits + 4 * count.head,  # its gradient is float32
        bucket=bucket,
        has_two_buckets=has_two_buckets,
    )


def _buckets(deepspeed: Any) -> tuple[int, bool]:
    """(size of DeepSpeed's bucket, whether there are two), from the config file if the recipe names one."""
    settings: dict[str, Any] = {}
    if isinstance(deepspeed, str):
        settings = json.loads(Path(deepspeed).read_text(encoding="utf-8")).get("zero_optimization", {})
    size = settings.get("reduce_bucket_size", BUCKET)
    if not isinstance(size, int | float):  # "auto"
        size = BUCKET
    return int(size), bool(settings.get("overlap_comm", True))


def _activations(
    recipe: Recipe, config: PretrainedConfig, length: int, compute_bytes: int, master_bytes: int
) -> tuple[float, float]:
    """(bytes kept for the backward pass, bytes of one chunk of logits)."""
    text = config.get_text_config()
    tokens = recipe.training.per_device_train_batch_size * length
    hidden, vocabulary_size = text.hidden_size, text.vocab_size
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden

    # 1. one layer in full; autocast keeps 4 hidden numbers of it in the dtype of the master weights
    autocast_extra = max(master_bytes - compute_bytes, 0) * 4 * hidden
    layer = tokens * (compute_bytes * (11 * hidden + 4 * intermediate) + autocast_extra)

    # 2. every layer in full, or only the inputs of the layers and one layer at a time
    if recipe.training.gradient_checkpointing:
        layer_input = tokens * max(compute_bytes, master_bytes) * hidden
        waiting = text.num_hidden_layers * layer_input + layer
    else:
        waiting = text.num_hidden_layers * layer

    # 3. logits and probabilities in float32, within the budget of mce.linear_matrix_cross_entropy
    budget = max(CHUNK_BYTES, 4 * vocabulary_size * hidden)
    return waiting, min(budget, tokens * vocabulary_size * 8)


def _plan_unsharded(sizes: Sizes) -> MemoryPlan:
    n, t, m = sizes.count.total, sizes.count.trained, sizes.master_bytes
    copies = 0
    if sizes.is_half and m == 4:
        # Autocast keeps half-precision copies of what trains, and of the rest for the backward pass.
        copies = 2 * (t if sizes.is_checkpointed else n)
    return MemoryPlan(
        engine="no sharding",
        weights=sizes.weight_bytes(m),
        copies=copies,
        gradients=m * t,
        optimizer=sizes.moment_bytes(m),
        activations=sizes.activations,
        lm_head=sizes.lm_head,
        buffers=m * t if sizes.processes > 1 else 0,  # DDP reduces gradients in its own buckets
    )


def _plan_zero(sizes: Sizes, stage: int) -> MemoryPlan:
    n, t, g, c = sizes.count.total, sizes.count.trained, sizes.processes, sizes.compute_bytes
    buckets = 2 if sizes.has_two_buckets and stage < 3 else 1
    buffers = c * buckets * sizes.bucket
    if stage == 3:
        buffers += c * min(n, MAX_LIVE)  # gathered layers
    return MemoryPlan(
        engine=f"ZeRO-{stage}",
        weights=sizes.weight_bytes(c) / (g if stage == 3 else 1),
        copies=4 * t / g,  # the float32 weights of the partition
        gradients=c * t / (g if stage >= 2 else 1),
        optimizer=sizes.moment_bytes(4) / g,
        activations=sizes.activations,
        lm_head=sizes.lm_head,
        buffers=buffers + 4 * t / g,  # at the step, the partition's gradients are flattened into a float32 copy
    )


def _plan_fsdp2(sizes: Sizes) -> MemoryPlan:
    count, g, c, m = sizes.count, sizes.processes, sizes.compute_bytes, sizes.master_bytes
    buffers = 0
    if g > 1:
        buffers = 2 * c * count.layer + c * count.embeddings  # this layer, the next one, and the embeddings
        if count.trained == count.total:
            buffers += m * count.layer  # the layer's gradients before they are scattered
    return MemoryPlan(
        engine="FSDP2",
        weights=sizes.weight_bytes(m) / g,
        copies=0,
        gradients=m * count.trained / g,
        optimizer=sizes.moment_bytes(m) / g,
        activations=sizes.activations,
        lm_head=sizes.lm_head,
        buffers=buffers,
    )


def memory_lines(recipe: Recipe, config: PretrainedConfig, length: int, processes: int) -> Iterator[str]:
    """`plan_memory` in words, and which engines fit the recipe's `gpu` if it names one."""
    gpu, plans = recipe.model.gpu, plan_memory(recipe, config, length, processes)
    yield from (plan.line(gpu) for plan in plans)
    if gpu is None:
        return
    fitting = [plan.engine for plan in plans if plan.total <= usable(gpu)]
    room = f"{gpu}: {usable(gpu) / GIB:.1f} of {GPUS[gpu]:.1f} GiB for tensors on each of {processes}"
    if fitting:
        yield f"{room}. Fits: {', '.join(fitting)}."
    else:
        yield (
            f"{room}. Nothing fits: use more GPUs, a smaller per_device_train_batch_size, gradient_checkpointing, or "
            "use_peft."
        )
