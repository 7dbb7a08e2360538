"""A complete training step (forward, backward, AdamW) of one Llama-shaped model, as MatrixTrainer makes it.

With mce_weight "0", which is SFTTrainer's own loss (TRL's fused head), and "1".
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.lm_head.memory import in_child, peak_of
from benchmarks.lm_head.timing import interleave

WEIGHTS = ("0", "1")


@dataclass(frozen=True)
class Step:
    layers: int
    """Decoder layers."""
    batch: int
    """Rows."""
    length: int
    """Tokens of a row."""
    hidden: int
    """Hidden width."""
    vocabulary: int
    """Vocabulary size."""
    device: str
    """`cpu` or `cuda`."""


def make_steps(task: Step) -> dict[str, Callable[[], None]]:
    """A call for each mce_weight that makes one step, of the same model and optimizer."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from matrix_llm.config import MatrixConfig
    from matrix_llm.model.tokenizer import train_tokenizer
    from matrix_llm.trainer import MatrixTrainer

    # 1. Model, optimizer, one batch.
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=task.vocabulary,
        hidden_size=task.hidden,
        intermediate_size=task.hidden * 43 // 16,  # 11008 for 4096
        num_hidden_layers=task.layers,
        num_attention_heads=max(1, task.hidden // (128 if task.hidden >= 2048 else 64)),
        max_position_embeddings=task.length,
    )
    config.dtype = torch.bfloat16 if task.device == "cuda" else torch.float32
    with torch.device(task.device):
        model = LlamaForCausalLM._from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(task.vocabulary, (task.batch, task.length), device=task.device)  # (B, T)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    tokens = torch.tensor(task.batch * (task.length - 1), device=task.device)

    def step(trainer: MatrixTrainer) -> None:
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1  # the weights have changed

    # 2. A trainer for each weight.
    steps = {}
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    for weight in WEIGHTS:
        settings = MatrixConfig(
            tempfile.mkdtemp(), mce_weight=float(weight), gradient_checkpointing=True, use_cpu=task.device == "cpu",
            bf16=False, max_length=task.length, report_to="none",
        )  # fmt: skip
        trainer = MatrixTrainer(model, settings, train_dataset=rows, processing_class=train_tokenizer(["a b"], 260))
        steps[weight] = functools.partial(step, trainer)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return steps


def step_memory(call: Callable[[], None], device: str) -> dict[str, int]:
    call()  # makes the optimizer's state
    return dataclasses.asdict(peak_of(call, device))


def measure_step(task: Step, repeats: int) -> dict[str, Any]:
    """Seconds and memory of the step with each weight."""
    memory: dict[str, Any] = {}
    if task.device == "cpu":  # first, for this process holds nothing yet that a child would have to share memory with
        memory = {weight: in_child({"step": weight, "task": dataclasses.asdict(task)}) for weight in WEIGHTS}
    steps = make_steps(task)
    if task.device == "cuda":
        memory = {weight: step_memory(call, task.device) for weight, call in steps.items()}
    return {"seconds": interleave(steps, lambda: None, repeats, task.device), "memory": memory}
