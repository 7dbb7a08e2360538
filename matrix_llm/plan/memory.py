"""Memory per GPU, before a weight is loaded: for no sharding, each ZeRO stage and FSDP2, full fine-tune, LoRA and QLoRA.

In bytes, with n parameters of which t train, on g GPUs; c bytes a number in the forward pass (2 under bf16 or fp16, else 4); m bytes a
master weight (4, or 2 for `dtype: bfloat16`). After Rajbhandari et al. 2020 (section 3), with what DeepSpeed and FSDP2 hold besides:

                no sharding   ZeRO-1        ZeRO-2        ZeRO-3        FSDP2
    weights     m n           c n           c n           c n / g       m n / g
    copies      2 t (*)       4 t / g       4 t / g       4 t / g       -            (*) under autocast; else none
    gradients   m t           c t           c t / g       c t / g       m t / g
    optimizer   8 t           8 t / g       8 t / g       8 t / g       8 t / g      (AdamW: two moments)
    buffers     m t (DDP)     buckets       buckets       bucket, gathered layers    one layer, gathered twice, and the embeddings

    activations a layer's input per token with gradient checkpointing and one layer whole; without, every layer whole:
                11 hidden + 4 intermediate numbers a token, as the Llama layer of transformers keeps them
    LM head     the float32 gradient of its weight, and one chunk of logits (the gathered weight is under buffers)

DeepSpeed also flattens its partition's gradients into a float32 copy for the step (4 t / g, under buffers). Its buckets are 500 million
numbers whatever the model's size, unless its config says otherwise. docs/training.md holds the estimate against measured peaks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig

from matrix_llm.base.gpus import GIB, GPUS, usable
from matrix_llm.config import Recipe
from matrix_llm.mce import CHUNK_BYTES
from matrix_llm.model.adapters import lora_config

ENGINES = ("no sharding", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
BUCKET = 500_000_000  # numbers; DeepSpeed's default
MAX_LIVE = 1_000_000_000  # gathered numbers that ZeRO-3 lets live at a time, by default
FOUR_BIT = 0.53  # bytes a number: half a byte, and the doubly quantised scales
PARTS = ("weights", "copies", "gradients", "optimizer", "activations", "lm_head", "buffers")


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated bytes per GPU."""

    engine: str
    weights: float
    copies: float
    gradients: float
    optimizer: float
    activations: float
    lm_head: float
    buffers: float

    @property
    def state(self) -> float:
        """What lasts from step to step: weights and copies, gradients, optimizer."""
        return self.weights + self.copies + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.state + self.activations + self.lm_head + self.buffers

    def line(self, gpu: str | None = None) -> str:
        parts = " + ".join(
            f"{name.replace('_', ' ')} {getattr(self, name) / GIB:.2f}" for name in PARTS if getattr(self, name)
        )
        if gpu is not None:
            fits = "fits" if self.total <= usable(gpu) else "DOES NOT FIT"
        else:
            fits = next(
                (f"fits {name}" for name in sorted(GPUS, key=usable) if self.total <= usable(name)),
                "fits no GPU known here",
            )
        return f"{self.engine:12} {self.total / GIB:8.2f} GiB = {parts}: {fits}"


@dataclass(frozen=True)
class Parameters:
    """How many numbers the model holds, tied ones once, adapters included."""

    total: int
    trained: int
    layer: int  # of the largest block that is gathered as one
    embeddings: int  # token embeddings and LM head
    linear: int  # of frozen linear layers that 4 bits would hold


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the architecture, tied ones once; built on the meta device, so nothing is allocated."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def parameters(recipe: Recipe, config: PretrainedConfig) -> Parameters:
    """Counted on the very model that will train, adapters and modules_to_save included, on the meta device."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        layers = [
            sum(p.numel() for p in layer.parameters())
            for m in model.modules()
            if isinstance(m, torch.nn.ModuleList)
            for layer in m
        ]
        heads = (model.get_input_embeddings(), model.get_output_embeddings())
        embeddings = sum(p.numel() for p in {id(m.weight): m.weight for m in heads if m is not None}.values())
        linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not heads[1])
        if (adapter := lora_config(recipe.model)) is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapter)
    unique = {id(p): p for p in model.parameters()}.values()
    trained = sum(p.numel() for p in unique if p.requires_grad)
    return Parameters(sum(p.numel() for p in unique), trained, max(layers, default=0), embeddings, linear)


def _buckets(recipe: Recipe) -> tuple[int, bool]:
    """(numbers in DeepSpeed's reduction bucket, whether there are two of them), from the recipe's DeepSpeed config where it has one."""
    zero: dict[str, Any] = {}
    if isinstance(given := recipe.training.deepspeed, str):
        zero = json.loads(Path(given).read_text(encoding="utf-8")).get("zero_optimization", {})
    size = zero.get("reduce_bucket_size", BUCKET)
    return (int(size) if isinstance(size, int | float) else BUCKET), bool(zero.get("overlap_comm", True))


def plan_memory(recipe: Recipe, config: PretrainedConfig, length: int, processes: int) -> list[MemoryPlan]:
    """One estimate for each engine, for micro-batches of `length` tokens a row; QLoRA is not sharded by ZeRO-3 and FSDP2."""
    training, model = recipe.training, recipe.model
    count = parameters(recipe, config)
    engines = ENGINES[:3] if model.load_in_4bit else ENGINES
    bucket, two = _buckets(recipe)
    half = training.bf16 or training.fp16
    c = 2 if half else 4
    m = 2 if model.dtype in ("bfloat16", "float16") else 4
    moments = 2 if "8bit" in str(training.optim) else 0 if str(training.optim) in ("sgd", "adafactor") else 2 * m
    t, n, g = count.trained, count.total, processes
    quantised = count.linear if model.load_in_4bit else 0
    activations, logits = _activations(recipe, config, length, c, m)
    head = count.embeddings if config.get_text_config().tie_word_embeddings else count.embeddings / 2
    trained_head = 4 * head if not model.use_peft or "lm_head" in (model.lora_modules_to_save or []) else 0

    def plan(engine: str) -> MemoryPlan:
        stage = int(engine[-1]) if engine.startswith("ZeRO") else 0
        shards = {
            part: g if stage >= first or engine == "FSDP2" else 1
            for part, first in (("weights", 3), ("gradients", 2), ("optimizer", 1))
        }
        size = c if stage else m  # DeepSpeed computes in half-precision weights, of which the float32 ones are the copy
        copies, buffers = 0.0, 0.0
        if stage:
            copies = 4 * t / g
            buffers = c * bucket * (1 if stage == 3 or not two else 2) + c * min(n, MAX_LIVE) * (stage == 3)
            buffers += 4 * t / g  # at the step the partition's gradients are flattened into a float32 copy
        elif engine == "FSDP2":
            buffers = (2 * c * count.layer + c * count.embeddings + m * count.layer * (t == n)) * (g > 1)
        else:
            buffers = m * t * (g > 1)  # DDP reduces gradients in buckets of its own
            if half and m == 4:
                copies = 2 * (
                    t if training.gradient_checkpointing else n
                )  # autocast keeps what trains, and backward needs the rest
        return MemoryPlan(
            engine,
            weights=(size * (n - quantised) + FOUR_BIT * quantised) / shards["weights"],
            copies=copies,
            gradients=size * t / shards["gradients"],
            optimizer=moments * (4 / m if stage else 1) * t / shards["optimizer"],
            activations=activations,
            lm_head=trained_head + logits,
            buffers=buffers,
        )

    return [plan(engine) for engine in engines]


def _activations(recipe: Recipe, config: PretrainedConfig, length: int, c: int, m: int) -> tuple[float, float]:
    """(bytes that wait for the backward pass, bytes of one chunk of the LM head)."""
    text = config.get_text_config()
    tokens = recipe.training.per_device_train_batch_size * length
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    layer = tokens * (c * (11 * text.hidden_size + 4 * inner) + (m - c if m > c else 0) * 4 * text.hidden_size)
    stream = (
        tokens * max(c, m) * text.hidden_size
    )  # the residual stream stays in the master weights' type under autocast
    checkpointed = text.num_hidden_layers * stream + layer
    waiting = checkpointed if recipe.training.gradient_checkpointing else text.num_hidden_layers * layer
    chunk = max(CHUNK_BYTES, 4 * text.vocab_size * text.hidden_size)  # mce.linear_matrix_cross_entropy's budget
    return waiting, min(chunk, tokens * text.vocab_size * 8)  # logits and probabilities in float32


def memory_lines(recipe: Recipe, config: PretrainedConfig, length: int, processes: int) -> Iterator[str]:
    """The plan as text, and which engines fit the GPU: the recipe's `gpu`, or the one that is here."""
    gpu, plans = recipe.model.gpu, plan_memory(recipe, config, length, processes)
    yield from (plan.line(gpu) for plan in plans)
    if gpu is None:
        return
    fitting = [plan.engine for plan in plans if plan.total <= usable(gpu)]
    room = f"{gpu}: {usable(gpu) / GIB:.1f} of {GPUS[gpu]:.1f} GiB for tensors on each of {processes}"
    if fitting:
        yield f"{room}. Fits: {', '.join(fitting)}."
    else:
        yield f"{room}. Nothing fits: take more GPUs, a smaller per_device_train_batch_size, gradient_checkpointing, or use_peft."
