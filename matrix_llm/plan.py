"""The arithmetic of a run, before it starts: batches, steps, tokens, and memory per GPU. Needs no GPU and loads no weight.

Memory counts, per GPU, with n parameters of which t train, on g GPUs (Rajbhandari et al. 2020, section 3):

    weights      4 n  (float32 master; 2 n for bfloat16), over g from ZeRO-3 on; + 2 n half-precision copies (DeepSpeed)
    gradients    4 t, over g from ZeRO-2 on
    optimizer    8 t  (AdamW: two float32 moments), over g from ZeRO-1 on
    activations  per layer and token 2 bytes x hidden with gradient checkpointing, about 34 without
    LM head      float32 gradient of the weight, 4 V H, and one chunk of logits
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from matrix_llm.config import MatrixConfig, Recipe
from matrix_llm.data import IGNORED, DataReport
from matrix_llm.mce import CHUNK_BYTES
from matrix_llm.solvers import Solver

GIB = 2**30


def describe_loss(training: MatrixConfig, config: PretrainedConfig) -> str:
    """The loss in words, e.g. "CE + 1 x MCE, krylov, 6 steps, the whole vocabulary of 32016, no sketch, embeddings lm_head, detached"."""
    if training.mce_weight == 0:
        return "CE (mce_weight: 0 is plain SFT)"
    text = config.get_text_config()
    solver = Solver.create(
        training.mce_solver,
        vocabulary=text.vocab_size,
        steps=training.mce_steps,
        order=training.mce_order,
        sketch_dim=training.mce_sketch_dim,
        top_k=training.mce_top_k,
    )
    parts = [f"CE + {training.mce_weight:g} x MCE", solver.name]
    if solver.name == "krylov":
        parts.append(f"{solver.steps} steps")
        parts.append(f"top_k {solver.top_k} of {text.vocab_size}" if solver.top_k else f"the whole vocabulary of {text.vocab_size}")
    if solver.name == "taylor":
        parts.append(f"order {solver.order}")
    parts.append(f"sketch {solver.sketch_dim}" if solver.sketch_dim else "no sketch")
    parts.append(f"embeddings {training.mce_embeddings}{', with gradient' if training.mce_embedding_grad else ', detached'}")
    return ", ".join(parts)


@dataclass(frozen=True)
class StepPlan:
    """How often the optimizer will step, and on how much."""

    rows: int
    micro_batch: int
    accumulation: int
    processes: int
    epochs: float
    steps: int
    tokens_per_step: float

    @property
    def effective_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.processes

    def lines(self) -> list[str]:
        return [
            f"effective batch  {self.micro_batch} x {self.accumulation} accumulation x {self.processes} processes"
            f" = {self.effective_batch} rows",
            f"optimizer steps  {self.steps:,} ({self.epochs:g} epochs of {self.rows:,} rows)",
            f"tokens           about {self.tokens_per_step:,.0f} a step, {self.tokens_per_step * self.steps:,.0f} in all",
        ]


def plan_steps(recipe: Recipe, report: DataReport, processes: int) -> StepPlan:
    """The step arithmetic of transformers' Trainer: a last partial accumulation still makes a step.

    With packing the number of rows is only known after packing, so it is estimated from the tokens.
    """
    training = recipe.training
    rows = report.rows_kept
    if training.packing and training.max_length:
        rows = max(1, math.ceil(report.tokens / training.max_length))
    micro, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    batches = math.ceil(rows / processes / micro)
    per_epoch = max(1, math.ceil(batches / accumulation))
    if training.max_steps > 0:
        steps, epochs = training.max_steps, training.max_steps / per_epoch
    else:
        steps, epochs = math.ceil(training.num_train_epochs * per_epoch), training.num_train_epochs
    batch = micro * accumulation * processes
    return StepPlan(rows, micro, accumulation, processes, epochs, steps, report.tokens / max(1, rows) * batch)


@dataclass(frozen=True)
class MemoryPlan:
    """Estimated bytes per GPU."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    lm_head: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.lm_head

    def line(self) -> str:
        parts = {k: getattr(self, k) / GIB for k in ("weights", "gradients", "optimizer", "activations", "lm_head")}
        name = "no sharding" if self.stage == 0 else f"ZeRO-{self.stage}"
        return f"{name:12} {self.total / GIB:8.2f} GiB = " + " + ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in parts.items())


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the architecture, tied ones once; built on the meta device, so nothing is allocated."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


def plan_memory(recipe: Recipe, config: PretrainedConfig, length: int, processes: int) -> list[MemoryPlan]:
    """One estimate for no sharding and for each ZeRO stage (FSDP2's full sharding is ZeRO-3's line)."""
    text = config.get_text_config()
    total = count_parameters(config)
    training, model = recipe.training, recipe.model
    trained = total
    if model.use_peft:  # rank r on each projection of each layer: 2 r x width, about seven projections
        trained = 14 * model.lora_r * text.hidden_size * text.num_hidden_layers
    half = training.bf16 or training.fp16
    master = 0.55 if model.load_in_4bit else 2 if model.dtype in ("bfloat16", "float16") else 4
    itemsize = 2 if half else 4
    tokens = training.per_device_train_batch_size * length
    per_token = itemsize * text.hidden_size * (1 if training.gradient_checkpointing else 17)
    activations = tokens * (per_token * text.num_hidden_layers + 17 * itemsize * text.hidden_size)
    head = 4 * text.vocab_size * text.hidden_size * (1 if not model.use_peft else 0)
    head += min(CHUNK_BYTES, tokens * text.vocab_size * 16)
    plans = []
    for stage in range(4):
        share = lambda first, size, stage=stage: size / processes if stage >= first else size  # noqa: E731
        weights = share(3, master * total + (2 * total if half and stage and master == 4 else 0))
        plans.append(MemoryPlan(stage, weights, share(2, 4 * trained), share(1, 8 * trained), activations, head))
    return plans


def masked_sample(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One row as the model sees it: runs of tokens, each marked as trained or masked.

    masked | <s>Question: What is 1 + 1?\\nAnswer:
    TRAINED|  The answer is: 2</s>
    """
    lines: list[str] = []
    start = 0
    labels, ids = row["labels"], row["input_ids"]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (labels[end] == IGNORED) != (labels[start] == IGNORED):
            mark = "masked " if labels[start] == IGNORED else "TRAINED"
            lines.append(f"{mark}| {tokenizer.decode(ids[start:end])}")
            start = end
    return lines
