"""`MatrixTrainer`: TRL's `SFTTrainer` with the matrix cross-entropy term. No mathematics here.

What it adds to `SFTTrainer`:
- the loss (CE + mce_weight * MCE) from `head.py`, divided once by the trained tokens of the whole accumulated batch over
  all ranks, so that accumulation 1 x 8 equals 8 x 1 and two ranks equal one
- the logged names `ce, mce, entropy, mean_token_accuracy, tokens_per_second, mfu, peak_memory_gib, effective_rank`,
  token-weighted over the whole logging window
- a guard: a non-finite loss on any process stops all of them before the optimizer steps, naming the step, the rows and the
  last checkpoint
- checkpoints that are whole or absent (`saving.py`)
"""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import compute_flops_per_token, get_peak_flops

from matrix_llm.base.errors import NonFiniteLossError
from matrix_llm.config import MatrixConfig
from matrix_llm.model.lm_head import HeadState, MatrixLossOptions, add_matrix_head, head_effective_rank
from matrix_llm.model.packing import check_isolation
from matrix_llm.run.checkpoint_files import last_complete_checkpoint
from matrix_llm.run.saving import WholeCheckpoints

logger = logging.getLogger(__name__)
WINDOW = "log_window_{}.json"  # in a checkpoint, one for each process


class RowIdCollator:
    """TRL's collator, with the `row_id` of each row kept aside for error messages.

    >>> collator = RowIdCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    >>> batch = collator([{"input_ids": [1, 2], "labels": [-100, 2], "row_id": 7}])
    >>> batch["row_id"]
    tensor([7])
    """

    def __init__(self, collator: DataCollatorForLanguageModeling) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        if "row_id" in examples[0]:
            batch["row_id"] = torch.tensor([example["row_id"] for example in examples])
        return batch


class WatchCallback(TrainerCallback):
    """Starts the throughput clock with training, and measures the LM head's effective rank at the first and last step and
    every `effective_rank_steps` between. Plain SFT (mce_weight 0, effective_rank_steps 0) is spared the latter."""

    def __init__(self, trainer: MatrixTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.trainer.restore_window()
        self.trainer.check_packing()
        self.trainer.restart_clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        every = self.trainer.args.effective_rank_steps
        if not every and self.trainer.args.mce_weight == 0:
            return
        if state.global_step in (1, state.max_steps) or (every and state.global_step % every == 0):
            self.trainer.record_effective_rank()


class MatrixTrainer(WholeCheckpoints, SFTTrainer):
    """Drop-in for `trl.SFTTrainer` that trains on CE + mce_weight * MCE. With mce_weight 0 it is `SFTTrainer`.

    Takes `SFTTrainer`'s arguments; `args` is a `MatrixConfig`.

    Raises:
        ValueError: a combination that would train wrongly in silence (an adapter on `lm_head`, label smoothing, DFT,
            a custom loss function, sequence parallelism), named with the way out.

    >>> trainer = MatrixTrainer(model, MatrixConfig("runs/x", mce_weight=1.0), train_dataset=rows)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    _clock: tuple[float, int]
    args: MatrixConfig
    model: PreTrainedModel
    _signature_columns: Any
    _tag_names = ["trl", "sft", "matrix-llm"]  # noqa: RUF012

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: MatrixConfig | None = None,
        *positional,
        **kwargs,
    ) -> None:
        if args is None:
            args = MatrixConfig("runs/matrix_llm")
        if not isinstance(args, MatrixConfig):
            raise TypeError(
                f"args is a {type(args).__name__}, but MatrixTrainer needs a MatrixConfig (a subclass of trl.SFTConfig)."
            )
        if args.mce_weight > 0 and kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func replaces the loss, so mce_weight would do nothing. Set mce_weight=0, or drop the function."
            )
        super().__init__(model, args, *positional, **kwargs)
        if isinstance(self.data_collator, DataCollatorForLanguageModeling):
            self.data_collator = RowIdCollator(self.data_collator)  # type: ignore[assignment]
        self._row_ids: Tensor | None = None
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self.restart_clock()
        self._flops_per_token: float | None = None
        if args.mce_weight > 0:
            self._refuse_parallelism()
            # The loss divides by num_items_in_batch itself, whatever the model's forward would accept.
            self.model_accepts_loss_kwargs = True
        options = MatrixLossOptions(
            args.mce_weight,
            args.mce_solver,
            args.mce_steps,
            args.mce_order,
            args.mce_sketch_dim,
            args.mce_top_k,
            args.mce_embeddings,
            args.mce_embedding_grad,
        )
        self._head_state: HeadState | None = None
        self._runs = 0  # calls of train(); the weights may have changed between two
        try:
            self._head_state = add_matrix_head(self._base_model(), options)
        except ValueError as error:
            if args.mce_weight > 0:
                raise
            # plain SFT needs no MCE; evaluation then reports SFTTrainer's figures alone
            logger.warning("MCE will not be measured on held-out rows: %s", error)
        self.add_callback(WatchCallback(self))

    def _base_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _refuse_parallelism(self) -> None:
        parallelism = self.accelerator.parallelism_config
        if parallelism is None:
            return
        if parallelism.sp_enabled and parallelism.sp_backend == "deepspeed":
            raise ValueError(
                "mce_weight > 0 with DeepSpeed sequence parallelism: Trainer reduces the model's own loss across ranks there, "
                "without the MCE term. Set mce_weight: 0, or drop sequence parallelism (sp_size: 1)."
            )
        if parallelism.tp_enabled:
            raise ValueError(
                "mce_weight > 0 with tensor parallelism: each rank holds a slice of the vocabulary, and the loss needs all of it. "
                "Set tp_size: 1 and shard with ZeRO-3 or FSDP2 instead."
            )

    # -- data: keep row_id beside the model's inputs --------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "row_id" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "row_id"]

    # -- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        self._row_ids = inputs.pop("row_id", None)
        mode = "train" if self.model.training else "eval"
        # Plain SFT trains as SFTTrainer does; its held-out rows are measured like everybody's, so that runs compare.
        if self.args.mce_weight == 0 and (mode == "train" or self._head_state is None):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._check_finite(result[0] if return_outputs else result, mode)
            return result

        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        assert self._head_state is not None
        if self._base_model()._matrix_head_state is not self._head_state:
            raise RuntimeError(
                "another MatrixTrainer was made for this model since, and its forward now follows that one's mce_ settings. "
                "Use the later trainer, or load the model anew."
            )
        self._head_state.step = (self._runs, self.state.global_step) if mode == "train" else None
        self._head_state.mce_weight = self.current_mce_weight if mode == "train" else self.args.mce_weight
        outputs = model(**inputs, use_cache=False, matrix_loss=True)
        tokens = outputs.label_mask.sum()
        count = tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=tokens.device)
        loss = outputs.loss_sum / count.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; the count is already over all ranks
        if self.aux_loss_enabled:
            # A mean per micro-batch, so it is averaged over the accumulation steps as well.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps

        self._check_finite(loss, mode)
        self._add(mode, "tokens", tokens)
        self._add(mode, "ce", outputs.cross_entropy.sum())
        self._add(mode, "mce", outputs.matrix_cross_entropy.sum())
        self._add(mode, "entropy", outputs.entropy.sum())
        self._add(mode, "mean_token_accuracy", outputs.is_top1.sum())
        if mode == "train":
            seen = (
                inputs["attention_mask"].sum()
                if "attention_mask" in inputs
                else torch.tensor(inputs["input_ids"].numel())
            )
            self._add(mode, "num_tokens", seen.to(tokens.device))
        if not return_outputs:
            return loss
        with torch.no_grad():  # somebody asked for the logits (compute_metrics): an extra forward, as in SFTTrainer
            return loss, model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)

    @property
    def current_mce_weight(self) -> float:
        """mce_weight * min(1, s / mce_warmup_steps) in step s = 1, 2, ...; held-out rows are always measured at the full weight."""
        share, weight = self.args.mce_warmup_steps, self.args.mce_weight
        steps = share if share >= 1 else share * self.state.max_steps
        return weight if steps <= 1 else weight * min(1.0, (self.state.global_step + 1) / steps)

    def _add(self, mode: str, name: str, value: Tensor) -> None:
        sums = self._sums[mode]
        value = value.detach().double()
        sums[name] = sums[name] + value if name in sums else value

    def _check_finite(self, loss: Tensor, mode: str) -> None:
        """Before the backward pass, since DeepSpeed steps inside it; on all processes together, since one that stopped alone
        would leave the others waiting for its gradients."""
        if mode == "eval":
            return
        bad = (~torch.isfinite(loss.detach())).float().reshape(1)
        several = self.accelerator.num_processes > 1
        if several:
            distributed.all_reduce(bad, distributed.ReduceOp.MAX)
        if not bad:
            return
        rows = None if self._row_ids is None else self._row_ids.tolist()
        here = [(loss.item(), rows)]
        found = [
            (value, rows) for value, rows in (gather_object(here) if several else here) if not math.isfinite(value)
        ]
        named = [row for _, rows in found for row in rows or []]
        last = last_complete_checkpoint(Path(str(self.args.output_dir)))
        way_out = f"resume from {last}" if last else "no checkpoint was written yet"
        raise NonFiniteLossError(
            f"The loss is {found[0][0]} at step {self.state.global_step + 1}, on the data rows {named or 'unknown (packed)'}. The "
            f"optimizer has not stepped, {way_out}. Look at these rows, lower learning_rate, or set max_grad_norm."
        )

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        start = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:  # throughput is that of training
            self._clock = (self._clock[0] + time.perf_counter() - start, self._clock[1])

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _complete(self, staged: Path, final: Path) -> None:
        """What Trainer leaves out of a sharded checkpoint."""
        super()._complete(staged, final)
        if not (staged / "config.json").is_file() and not is_peft_model(
            self.accelerator.unwrap_model(self.model)
        ):  # sharded by FSDP
            model = self._base_model()
            model.config.save_pretrained(staged)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(staged)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(staged)

    def _keep_window(self, folder: Path) -> None:
        """This process's sums since the last log, so that the row which straddles a checkpoint is that of an unbroken run."""
        window = {
            "tokens": self._total_train_tokens,
            "last_logged": self._globalstep_last_logged,
            "loss": float(self._tr_loss),
            "sums": {name: float(value) for name, value in self._sums["train"].items()},
            "metrics": {name: [float(value) for value in values] for name, values in self._metrics["train"].items()},
        }
        (folder / WINDOW.format(self.args.process_index)).write_text(json.dumps(window), encoding="utf-8")

    def restore_window(self) -> None:
        file = Path(self._resumed_from or "", WINDOW.format(self.args.process_index))
        if self._resumed_from is None or not file.is_file():
            return
        window = json.loads(file.read_text(encoding="utf-8"))
        device = self.args.device
        self._total_train_tokens = window["tokens"]
        self._globalstep_last_logged = window["last_logged"]
        self._tr_loss = torch.tensor(window["loss"], device=device)
        self._total_loss_scalar = -window["loss"]  # the summary's train_loss is over the steps of this call
        self._sums["train"] = {
            name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in window["sums"].items()
        }
        self._metrics["train"].update(window["metrics"])

    def train(self, *args, **kwargs):
        self._runs += 1
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._head_state is not None:
                self._head_state.step = None  # whoever calls the model now may have other weights

    def check_packing(self) -> None:
        """Through the engine, once the weights are where they are trained (packing.py)."""
        if not self.padding_free or self._head_state is None:
            return
        base = self._base_model()
        check_isolation(
            self.model_wrapped,
            self.data_collator,
            self._prepare_inputs,
            vocabulary=base.config.get_text_config().vocab_size,
            half=self.args.bf16 or self.args.fp16 or base.dtype != torch.float32,
            description=f"{type(base).__name__} with attn_implementation={base.config._attn_implementation!r}",
        )

    # -- logs -----------------------------------------------------------------------------------------------------------

    def record_effective_rank(self) -> None:
        self._metrics["train"]["effective_rank"].append(head_effective_rank(self._base_model()))

    def _reduced(self, mode: str) -> dict[str, float]:
        """The window's token-weighted means, over all ranks; one collective per log, not one per micro-batch."""
        sums = self._sums[mode]
        if not sums:
            return {}
        names = sorted(sums)
        total = self.accelerator.reduce(
            torch.stack([sums[name] for name in names]).to(self.accelerator.device).float(), "sum"
        )
        reduced = dict(zip(names, total.tolist(), strict=True))
        sums.clear()
        tokens = max(reduced.pop("tokens"), 1.0)
        if "num_tokens" in reduced:
            self._total_train_tokens += int(reduced.pop("num_tokens"))
        return {name: value / tokens for name, value in reduced.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        metrics: defaultdict[str, list[float]] = self._metrics[mode]
        for name, value in self._reduced(mode).items():
            metrics[name] = [value]
        prefix = "eval_" if mode == "eval" else ""
        loss_key = f"{prefix}loss"
        if self.args.mce_weight == 0 and loss_key in logs and "ce" not in metrics:
            metrics["ce"] = [logs[loss_key]]
        if mode == "train" and "loss" in logs:
            metrics["num_tokens"] = [self._total_train_tokens]
            if self.args.mce_warmup_steps and self._head_state is not None:
                metrics["mce_weight"] = [self._head_state.mce_weight]  # of the window's last step
            metrics.update({name: [value] for name, value in self._speed().items()})
        super().log(logs, start_time)

    def restart_clock(self) -> None:
        """Since when, and trained how many tokens by then."""
        self._clock = (time.perf_counter(), self._total_train_tokens)

    def _speed(self) -> dict[str, float]:
        now, (since, before) = time.perf_counter(), self._clock
        self._clock = (now, self._total_train_tokens)
        rate = (self._total_train_tokens - before) / max(now - since, 1e-9)
        speed = {"tokens_per_second": rate, "peak_memory_gib": peak_memory_gib(self.accelerator.device)}
        if self.accelerator.device.type == "cuda":
            precision = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"
            peak = get_peak_flops(torch.cuda.get_device_name(self.accelerator.device), precision)
            if peak is not None:
                if self._flops_per_token is None:
                    length = self.args.max_length or 1024
                    self._flops_per_token = compute_flops_per_token(self._base_model().config.get_text_config(), length)
                speed["mfu"] = 100 * self._flops_per_token * rate / (peak * self.accelerator.num_processes)
        return {name: value for name, value in speed.items() if math.isfinite(value)}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: the accelerator's allocator, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
