"""The arithmetic of a run before it starts: batches, steps, tokens, the loss in words, a row with its mask.

No weight is loaded. The run's memory is estimated in memory.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from matrix_llm.base.text import quoted_lines
from matrix_llm.config import MatrixConfig, Recipe
from matrix_llm.data.selection import DataReport
from matrix_llm.data.tokens import IGNORED
from matrix_llm.loss.choice import recipe_settings
from matrix_llm.loss.settings import TARGET_TOKENS, LossSettings


def describe_token_loss(training: MatrixConfig) -> str:
    """The loss that MCE is added to, with its settings: "CE", or e.g. "focal (gamma 2)"."""
    if training.token_loss == "ce":
        return "CE"
    settings = recipe_settings(training.token_loss, training.token_loss_settings)
    if training.teacher_model_name_or_path is not None:
        settings["teacher"] = training.teacher_model_name_or_path
    elif training.token_loss == "asft":
        settings["reference"] = "the base, without adapters"
    said = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )
    return f"{training.token_loss} ({said})" if said else training.token_loss


def describe_loss(training: MatrixConfig, config: PretrainedConfig) -> str:
    """The loss in words, with the defaults that a recipe leaves open.

    E.g. "CE + 1 x MCE, krylov, 6 steps, top 16 of 32016 and tail, no sketch, embeddings lm_head, detached".
    """
    if not training.uses_matrix_head:
        return "CE (mce_weight: 0 is plain SFT)"
    loss = describe_token_loss(training)
    if training.mce_weight == 0:
        return loss
    vocabulary_size = config.get_text_config().vocab_size
    solver = LossSettings.from_config(training).solver_for(vocabulary_size)

    # 1. the weight
    weight = f"{loss} + {training.mce_weight:g} x MCE"
    if training.mce_target == "teacher":
        weight += f" towards the teacher's top {TARGET_TOKENS}"
    if (warmup := training.mce_warmup_steps) >= 1:
        weight += f" (rising over the first {warmup:g} steps)"
    elif warmup > 0:
        weight += f" (rising over the first {100 * warmup:g} % of the steps)"

    # 2. how log Q is evaluated
    parts = [weight, solver.name]
    if solver.name == "krylov":
        everything = f"the whole vocabulary of {vocabulary_size}"
        if training.mce_target == "label" or solver.top_k is None:  # else one logarithm, which takes no steps
            parts.append(f"{solver.steps} steps")
        parts.append(f"top {solver.top_k} of {vocabulary_size} and tail" if solver.top_k else everything)
    elif solver.name == "taylor":
        parts.append(f"order {solver.order}")

    # 3. the token vectors
    parts.append(f"sketch {solver.sketch_dim}" if solver.sketch_dim else "no sketch")
    parts.append(f"embeddings {training.mce_embeddings}")
    parts.append("with gradient" if training.mce_embedding_grad else "detached")
    return ", ".join(parts)


@dataclass(frozen=True)
class StepPlan:
    """How often the optimizer will step, and on how much."""

    rows: int
    """Rows in an epoch; with packing, packed rows."""

    micro_batch: int
    """Rows in one forward pass on one process."""

    accumulation: int
    """Micro-batches in one optimizer step."""

    processes: int
    """Processes that train in parallel."""

    epochs: float | None
    """Passes over the rows; None for a stream, whose length is not known."""

    steps: int
    """Optimizer steps."""

    tokens_per_step: float
    """Average number of tokens in one optimizer step over all processes."""

    @property
    def effective_batch(self) -> int:
        """Rows in one optimizer step."""
        return self.micro_batch * self.accumulation * self.processes

    def lines(self) -> list[str]:
        factors = f"{self.micro_batch} x {self.accumulation} accumulation x {self.processes} processes"
        span = f"({self.epochs:g} epochs of {self.rows:,} rows)" if self.epochs else "(of a stream)"
        tokens = f"about {self.tokens_per_step:,.0f} a step, {self.tokens_per_step * self.steps:,.0f} in all"
        return [
            f"effective batch  {factors} = {self.effective_batch} rows",
            f"optimizer steps  {self.steps:,} {span}",
            f"tokens           {tokens}",
        ]


def plan_steps(recipe: Recipe, report: DataReport, processes: int) -> StepPlan:
    """The step arithmetic of transformers' Trainer, where a partial accumulation at the end still makes a step."""
    training = recipe.training
    micro_batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps

    # 1. rows; how many packing makes is only known after packing, so they are estimated from the tokens
    rows = report.rows_kept
    if training.packing and training.max_length:
        rows = max(1, math.ceil(report.tokens / training.max_length))

    # 2. steps
    batches = math.ceil(rows / processes / micro_batch)
    steps_per_epoch = max(1, math.ceil(batches / accumulation))
    if training.max_steps > 0:
        steps, epochs = training.max_steps, training.max_steps / steps_per_epoch
    else:
        steps, epochs = math.ceil(training.num_train_epochs * steps_per_epoch), training.num_train_epochs

    # 3. tokens
    tokens_per_row = report.tokens / max(1, rows)
    return StepPlan(
        rows=rows,
        micro_batch=micro_batch,
        accumulation=accumulation,
        processes=processes,
        epochs=None if report.sampled else epochs,
        steps=steps,
        tokens_per_step=tokens_per_row * micro_batch * accumulation * processes,
    )


def masked_sample(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One row as the model sees it: runs of tokens, each marked as trained or masked.

    masked | <s>Question: What is 1 + 1?\\nAnswer:
    TRAINED|  The answer is: 2</s>
    """
    lines = []
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for is_masked, run in groupby(pairs, key=lambda pair: pair[1] == IGNORED):
        mark = "masked " if is_masked else "TRAINED"
        lines.append(f"{mark}| {quoted_lines(str(tokenizer.decode([token for token, _ in run])))}")
    return lines
