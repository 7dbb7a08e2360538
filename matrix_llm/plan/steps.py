"""The arithmetic of a run, before it starts: batches, steps, tokens, the loss in words, a row with its mask. No weight is loaded.

How much memory it takes is counted in memory.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from matrix_llm.config import MatrixConfig, Recipe
from matrix_llm.data.selection import DataReport
from matrix_llm.data.tokens import IGNORED
from matrix_llm.loss.settings import LossSettings
from matrix_llm.plan.memory import count_parameters, memory_lines, plan_memory

__all__ = [
    "StepPlan",
    "count_parameters",
    "describe_loss",
    "masked_sample",
    "memory_lines",
    "plan_memory",
    "plan_steps",
]


def describe_loss(training: MatrixConfig, config: PretrainedConfig) -> str:
    """The loss in words, e.g. "CE + 1 x MCE, krylov, 6 steps, top 16 of 32016 and tail, no sketch, embeddings lm_head, detached"."""
    if training.mce_weight == 0:
        return "CE (mce_weight: 0 is plain SFT)"
    text = config.get_text_config()
    solver = LossSettings.from_config(training).solver_for(text.vocab_size)
    parts = [f"CE + {training.mce_weight:g} x MCE", solver.name]
    if rising := training.mce_warmup_steps:
        parts[0] += (
            f" (rising over the first {f'{rising:g} steps' if rising >= 1 else f'{100 * rising:g} % of the steps'})"
        )
    if solver.name == "krylov":
        parts.append(f"{solver.steps} steps")
        parts.append(
            f"top {solver.top_k} of {text.vocab_size} and tail"
            if solver.top_k
            else f"the whole vocabulary of {text.vocab_size}"
        )
    if solver.name == "taylor":
        parts.append(f"order {solver.order}")
    parts.append(f"sketch {solver.sketch_dim}" if solver.sketch_dim else "no sketch")
    parts.append(
        f"embeddings {training.mce_embeddings}{', with gradient' if training.mce_embedding_grad else ', detached'}"
    )
    return ", ".join(parts)


@dataclass(frozen=True)
class StepPlan:
    """How often the optimizer will step, and on how much."""

    rows: int
    micro_batch: int
    accumulation: int
    processes: int
    epochs: float | None  # None: a stream, whose length is not known
    steps: int
    tokens_per_step: float

    @property
    def effective_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.processes

    def lines(self) -> list[str]:
        return [
            f"effective batch  {self.micro_batch} x {self.accumulation} accumulation x {self.processes} processes"
            f" = {self.effective_batch} rows",
            f"optimizer steps  {self.steps:,} "
            + (f"({self.epochs:g} epochs of {self.rows:,} rows)" if self.epochs else "(of a stream)"),
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
    known = None if report.sampled else epochs
    return StepPlan(rows, micro, accumulation, processes, known, steps, report.tokens / max(1, rows) * batch)


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
