"""`MatrixTrainer`: TRL's `SFTTrainer` with the matrix cross-entropy term. No mathematics here.

What it adds to `SFTTrainer`, in this order:
- loss: token loss (CE unless another is asked for) + mce_weight * MCE from model/lm_head.py, divided once by the
  trained tokens of the full accumulated batch over all ranks, so that accumulation 1 x 8 equals 8 x 1 and two ranks
  equal one; the hidden states of a teacher (model/teacher.py) where the loss needs them
- logs: `ce, mce, token_loss, entropy, mean_token_accuracy, tokens_per_second, mfu, peak_memory_gib, effective_rank`,
  token-weighted over the logging window (run/window.py)
- held-out figures: token-weighted means over the real rows (run/evaluation.py), whatever the batches and processes
- checkpoints: complete or absent (run/saving.py), each with the logging window that is open when it is saved
- guards: a non-finite loss on any process stops all of them before the optimizer steps, naming the step, the rows and
  the last checkpoint (plain SFT in float16 only on the command line); packed rows that see each other are refused
  (model/packing.py)
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import math
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from torch import Tensor, distributed, nn
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import get_peak_flops

from matrix_llm.base.console import say
from matrix_llm.base.errors import CheckpointError, DataError, NonFiniteLossError, RecipeError, one_line
from matrix_llm.config import MatrixConfig
from matrix_llm.loss.choice import HAS_FLOOR, NEEDS_TEACHER, recipe_settings
from matrix_llm.loss.settings import LossSettings
from matrix_llm.losses import number_tokens
from matrix_llm.model.adapters import keep_base_unchanged
from matrix_llm.model.lm_head import MatrixHead, add_matrix_head, head_effective_rank
from matrix_llm.model.load import repair_generation_settings
from matrix_llm.model.older_readers import add_older_names
from matrix_llm.model.packing import check_isolation
from matrix_llm.model.teacher import BaseModel, TeacherModel
from matrix_llm.run.checkpoint_files import last_complete_checkpoint
from matrix_llm.run.evaluation import count_stream, mask_repeated_rows, weighted_mean
from matrix_llm.run.rehearsal import NotRehearsedError, rehearse_saving
from matrix_llm.run.saving import AtomicCheckpoints
from matrix_llm.run.window import TokenClock, TokenSums, peak_memory_gib, training_flops_per_token

logger = logging.getLogger(__name__)
WINDOW = "log_window_{}.json"  # in a checkpoint, one for each process


@dataclass
class RowIdCollator(DataCollatorForLanguageModeling):
    """TRL's collator, with the `row_id` of each row in the batch, for error messages.

    A column of that name which does not hold numbers is somebody else's, and is dropped like any unknown column.

    Args:
        keep_lengths: whether rows that are flattened into one sequence come with their `row_lengths`, so that those
            which several processes repeat can be told apart.

    >>> collator = RowIdCollator(pad_token_id=0)
    >>> batch = collator([{"input_ids": [1, 2], "labels": [-100, 2], "row_id": 7}])
    >>> batch["row_id"]
    tensor([7])
    """

    keep_lengths: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        ids = [example.get("row_id") for example in examples]
        if all(isinstance(each, int) for each in ids):
            batch["row_id"] = torch.tensor(ids)
        if self.padding_free and self.keep_lengths:
            batch["row_lengths"] = torch.tensor([len(example["input_ids"]) for example in examples])
        return batch


class WatchCallback(TrainerCallback):
    """Restores the window, checks packing, starts the clock, and measures the LM head's effective rank during training.

    The rank is measured at the first step, at the last, and every `effective_rank_steps` between; not in plain SFT
    (mce_weight 0) unless effective_rank_steps asks for it.
    """

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


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which goes on counting in a resumed run."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        states: Any = state.stateful_callbacks
        saved = states.get(type(self).__name__) or {"attributes": {}}
        self.early_stopping_patience_counter = saved["attributes"].get("early_stopping_patience_counter", 0)

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:  # type: ignore[override]
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if control.should_training_stop:
            say(
                f"=> early stop at step {state.global_step}: {args.metric_for_best_model} has not improved in "
                f"{self.early_stopping_patience_counter} evaluations, best {state.best_metric:.6g}"
            )


def to_matrix_config(args: MatrixConfig | TrainingArguments | None) -> MatrixConfig:
    """The trainer's settings from whatever `SFTTrainer` takes; the mce_ settings then have their defaults.

    What a subclass of the caller's adds to SFTConfig stays an attribute.
    """
    if args is None:
        return MatrixConfig("runs/matrix_llm")
    if isinstance(args, MatrixConfig):
        return args
    tokens = {name: value for name, value in vars(args).items() if name.endswith("_token")}  # to_dict hides them all
    given, known = {**args.to_dict(), **tokens}, {field.name for field in fields(MatrixConfig)}
    config = MatrixConfig(**{name: value for name, value in given.items() if name in known})
    for name in given.keys() - known:
        setattr(config, name, getattr(args, name))
    return config


def _use_cache_of(model: str | PreTrainedModel, args: MatrixConfig) -> bool | None:
    """Whether the base model generates with a cache, for the saved config.json; None if it does not say."""
    if isinstance(model, str):
        options: Any = args.model_init_kwargs or {}
        revision = options.get("revision", "main")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    else:
        config = getattr(model, "config", None)
    return getattr(config, "use_cache", None)


class MatrixTrainer(AtomicCheckpoints, SFTTrainer):
    """Drop-in for `trl.SFTTrainer` that trains on token_loss + mce_weight * MCE. With "ce" and 0 it is `SFTTrainer`.

    Takes `SFTTrainer`'s arguments; `args` is a `MatrixConfig`. An `SFTConfig` or `TrainingArguments` is taken too, with
    the defaults of the mce_ settings.

    Raises:
        RecipeError, ModelError (both ValueErrors): a combination that would silently train wrongly, such as an adapter
            on `lm_head` or a custom loss function; the message names the way out.

    >>> trainer = MatrixTrainer(model, MatrixConfig("runs/x", mce_weight=1.0), train_dataset=rows)  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    args: MatrixConfig
    model: PreTrainedModel
    _signature_columns: Any
    _tag_names = ["trl", "sft", "matrix-llm"]  # noqa: RUF012
    stops_at_overflow = False
    """Whether a non-finite loss stops plain SFT in float16 as well, where SFTTrainer often recovers."""

    @functools.wraps(SFTTrainer.__init__)  # type: ignore[misc]  # tools read the signature to see what it takes
    def __init__(
        self,
        model: str | PreTrainedModel,
        args: MatrixConfig | TrainingArguments | None = None,
        *positional,
        **kwargs,
    ) -> None:
        # 1. arguments
        args = to_matrix_config(args)
        given = inspect.signature(SFTTrainer.__init__).bind(self, model, args, *positional, **kwargs).arguments
        if args.uses_matrix_head and given.get("compute_loss_func") is not None:
            raise RecipeError(
                f"mce_weight={args.mce_weight} and token_loss={args.token_loss!r} with a compute_loss_func, which "
                "replaces the loss. Set mce_weight: 0 and token_loss: ce, or remove compute_loss_func."
            )
        self._base_use_cache = _use_cache_of(model, args)  # Trainer is about to switch it off
        super().__init__(model, args, *positional, **kwargs)
        if type(self.data_collator) is DataCollatorForLanguageModeling:  # a subclass is the caller's own, and stays
            several = self.accelerator.num_processes > 1
            self.data_collator = RowIdCollator(**vars(self.data_collator), keep_lengths=several)
        if args.uses_matrix_head:
            # The loss divides by num_items_in_batch itself, whatever the model's forward would accept.
            self.model_accepts_loss_kwargs = True

        keep_base_unchanged(self.model)  # PiSSA's adapters are saved for the base that was loaded
        repair_generation_settings(self._base_model())  # or the first save would fail

        # 2. state
        self._row_ids: Tensor | None = None  # of the micro-batch in progress
        self._sums = {"train": TokenSums(), "eval": TokenSums()}
        self._eval_batches: list[Tensor] = []  # (2,) of each held-out batch here: its trained tokens, its summed loss
        self._clock = TokenClock(self._total_train_tokens)
        self._rehearsed = False  # saving was tried
        self._overflowed = False  # in float16, and that was said
        self._train_calls = 0  # the weights may have changed between two calls of train()

        # 3. the loss, inside the model's forward
        self._matrix_head: MatrixHead | None = None
        self._number_ids: Tensor | None = None  # ntl's
        self._batch_scale: Tensor | None = None  # trained tokens / numbers of the accumulated batch, for ntl
        settings = LossSettings.from_config(args)
        if args.token_loss == "ntl":
            self._number_ids, values = number_tokens(self.processing_class)
            numbers = {"number_ids": self._number_ids, "number_values": values}
            settings = replace(settings, token_loss_settings={**(settings.token_loss_settings or {}), **numbers})
        try:
            self._matrix_head = add_matrix_head(self._base_model(), settings)
        except RecipeError as error:
            if args.uses_matrix_head:
                raise
            # Plain SFT needs no MCE: evaluation then reports SFTTrainer's figures alone.
            logger.warning("MCE will not be measured on held-out rows: %s", error)
        self._teacher = self._make_teacher() if args.token_loss in NEEDS_TEACHER else None
        self.add_callback(WatchCallback(self))
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold))

    def _make_teacher(self) -> TeacherModel | BaseModel:
        """The model whose distribution is the target; its LM head is read in the student's forward."""
        assert self._matrix_head is not None
        teacher: TeacherModel | BaseModel
        if self.args.teacher_model_name_or_path is None:
            teacher = BaseModel(self, self.accelerator.unwrap_model(self.model))
        else:
            teacher = TeacherModel(self.args, self._base_model(), self.processing_class, self.accelerator)
        self._matrix_head.teacher = teacher.head
        return teacher

    def _teacher_states(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What the student's forward takes of the teacher."""
        return {} if self._teacher is None else {"teacher_hidden": self._teacher.hidden(inputs)}

    def _base_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    def _set_signature_columns_if_needed(self) -> None:
        """Keep `row_id` in the batch along with the model's inputs."""
        super()._set_signature_columns_if_needed()
        if "row_id" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "row_id"]

    def train(self, *args, **kwargs):
        if not self._rehearsed and str(self.args.save_strategy) not in ("no", "SaveStrategy.NO"):
            try:
                self.rehearse_saving(read_back=False)
            except NotRehearsedError as error:
                logger.warning("Whether checkpoints can be saved was not tried: %s", error)
        self._train_calls += 1
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._matrix_head is not None:
                self._matrix_head.step = None  # the weights may change now, and the cached summary with them

    # -- loss ---------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        self._row_ids = inputs.pop("row_id", None)
        inputs.pop("row_lengths", None)
        mode = "train" if self.model.training else "eval"

        # 1. Plain SFT trains as SFTTrainer does. Its held-out rows are measured as in any run, so that runs compare,
        #    unless it trains another loss, by which its checkpoints are then chosen.
        if not self.args.uses_matrix_head and not (mode == "eval" and self._measures_mce):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._check_finite(result[0] if return_outputs else result, mode)
            return result

        # 2. the summed loss of this micro-batch
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        self._set_step(mode)
        self._set_own_scale(inputs, num_items_in_batch)
        try:
            outputs = model(**inputs, **self._teacher_states(inputs), use_cache=False, matrix_loss=True)
        except ValueError as error:
            if "Image features and image tokens do not match" in str(error) and self.args.max_length is not None:
                raise DataError(
                    f"max_length={self.args.max_length} cuts image tokens off a row, whose image then has no place in "
                    "it. Set a larger max_length, or null."
                ) from error
            raise

        # 3. divided once, by the trained tokens of the full accumulated batch over all ranks
        tokens = outputs.label_mask.sum()
        count = tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=tokens.device)
        loss = outputs.loss_sum / count.clamp(min=1)  # a batch without a trained token: 0, not 0 / 0
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; the count is already over all ranks
        if self.aux_loss_enabled:
            # A mean per micro-batch, so it is averaged over the accumulation steps as well.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps

        # 4. guard and logs
        self._check_finite(loss, mode)
        self._sums[mode].add(
            tokens=tokens,
            ce=outputs.cross_entropy.sum(),
            mce=outputs.matrix_cross_entropy.sum(),
            entropy=outputs.entropy.sum(),
            mean_token_accuracy=outputs.is_top1.sum(),
        )
        if self.args.token_loss != "ce":
            self._sums[mode].add(token_loss=outputs.token_loss.sum())
        if self.args.token_loss in HAS_FLOOR:  # what is left to learn: the (matrix) KL divergence
            self._sums[mode].add(divergence=(outputs.token_loss - outputs.floor).sum())
        if self._number_ids is not None:
            self._sums[mode].add(numbers=self._count_numbers(inputs))
        if self.aux_loss_enabled:
            self._sums[mode].add(aux_loss=outputs.aux_loss, micro_batches=torch.ones_like(outputs.aux_loss))
        if mode == "train":
            mask = inputs.get("attention_mask")
            seen = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
            self._sums[mode].add(num_tokens=seen.to(tokens.device))
        if not return_outputs:
            return loss
        with torch.no_grad():  # the logits were asked for (compute_metrics): an extra forward, as in SFTTrainer
            return loss, model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Trainer's; for ntl, the trained tokens of the accumulated batch over all ranks / those that are numbers."""
        samples, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._number_ids is not None and count is not None:
            numbers = sum((self._count_numbers(batch) for batch in samples), torch.tensor(0)).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                numbers = self.accelerator.gather(numbers).sum()
            if not numbers and self.state.global_step == 0:
                logger.warning(
                    "No label of the first batch is a digit, so ntl trains nothing there: see number_share in the log."
                )
            self._batch_scale = torch.as_tensor(count, device=device) / numbers if numbers > 0 else torch.tensor(0.0)
        return samples, count

    def _count_numbers(self, batch: dict[str, Any]) -> Tensor:
        """How many labels of a batch are numbers, ()."""
        labels = batch["shift_labels"] if "shift_labels" in batch else batch["labels"][..., 1:]
        assert self._number_ids is not None
        return torch.isin(labels, self._number_ids.to(labels.device)).sum()

    def _set_own_scale(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> None:
        """Tell the model's forward what ntl's term is multiplied by, so that dividing by all tokens makes its mean."""
        if self._number_ids is None:
            return
        assert self._matrix_head is not None
        if num_items_in_batch is not None and self._batch_scale is not None:
            self._matrix_head.own_scale = float(self._batch_scale)
            return
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
        numbers = int(self._count_numbers(inputs))
        self._matrix_head.own_scale = float((labels != -100).sum()) / numbers if numbers else 0.0

    @property
    def _trains_cross_entropy(self) -> bool:
        """Whether the loss is CE (with or without MCE) and not DFT, label smoothing or the caller's own function."""
        if self.args.token_loss != "ce":
            return False
        return self.args.loss_type == "nll" and self.args.label_smoothing_factor == 0 and self.compute_loss_func is None

    @property
    def _measures_mce(self) -> bool:
        """Whether held-out rows are measured by the matrix head, where SFTTrainer's loss would otherwise do."""
        return self.args.uses_matrix_head or (
            self._matrix_head is not None and self._trains_cross_entropy and not self._shares_rows
        )

    @property
    def _shares_rows(self) -> bool:
        """Whether several processes work on the same rows: tensor, context or sequence parallelism."""
        parallel = self.accelerator.parallelism_config
        return parallel is not None and max(parallel.tp_size, parallel.cp_size, parallel.sp_size) > 1

    def _set_step(self, mode: str) -> None:
        """Tell the model's forward whose settings it follows, which step this is, and the weight of MCE in it."""
        assert self._matrix_head is not None
        self._base_model()._matrix_head = self._matrix_head  # type: ignore[assignment]  # a later trainer set its own
        is_step = mode == "train" and self.is_in_train  # in a loop of the caller's own, nobody counts steps
        self._matrix_head.step = (self._train_calls, self.state.global_step) if is_step else None
        self._matrix_head.mce_weight = self.current_mce_weight if mode == "train" else self.args.mce_weight

    @property
    def current_mce_weight(self) -> float:
        """mce_weight * min(1, s / mce_warmup_steps) in step s = 1, 2, ...

        Below 1, mce_warmup_steps is a share of all steps. Held-out rows are always measured at the full weight.
        """
        warmup, weight = self.args.mce_warmup_steps, self.args.mce_weight
        steps = warmup if warmup >= 1 else warmup * self.state.max_steps
        return weight if steps <= 1 else weight * min(1.0, (self.state.global_step + 1) / steps)

    # -- logs ---------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:  # held-out figures are complete: see evaluation_loop
            self._add_window(logs)
        super().log(logs, start_time)

    def _add_window(self, logs: dict[str, float]) -> None:
        """Add the figures of the logging window that ends here to SFTTrainer's."""
        metrics: defaultdict[str, list[float]] = self._metrics["train"]

        # 1. the window's token-weighted means; an auxiliary loss is a mean over its micro-batches
        seen = self._count_tokens()
        metrics.update({name: [value] for name, value in self._take_means("train").items()})
        if metrics or "loss" in logs:
            metrics["num_tokens"] = [seen]

        # 2. plain SFT's loss is its cross-entropy (and a mixture's auxiliary loss), unless it trains another one
        if not self.args.uses_matrix_head and self._trains_cross_entropy and "loss" in logs:
            metrics["ce"] = [logs["loss"] - self.router_aux_loss_coef * weighted_mean(metrics.get("aux_loss", []))]

        # 3. progress and speed
        if "loss" in logs:
            if self.args.mce_warmup_steps and self._matrix_head is not None:
                metrics["mce_weight"] = [self._matrix_head.mce_weight]  # of the window's last step
            metrics.update({name: [value] for name, value in self._measure_speed().items()})

    def _take_means(self, mode: str) -> dict[str, float]:
        """The means of all processes since the last call. A collective."""
        sums = self._sums[mode].take(self.accelerator)
        numbers = sums.pop("numbers", None)
        if numbers is not None:  # the mean of ntl's term is over the labels that are numbers
            sums["token_loss"] = self._spread_over_tokens(sums, numbers)
            sums["number_share"] = numbers
        tokens, batches = max(sums.pop("tokens", 0.0), 1.0), max(sums.pop("micro_batches", 0.0), 1.0)
        return {name: value / (batches if name == "aux_loss" else tokens) for name, value in sums.items()}

    def _spread_over_tokens(self, sums: dict[str, float], numbers: float) -> float:
        """The sum of ntl which, divided by all tokens, is CE's mean plus the term's mean over the numbers alone."""
        weighs_ce = recipe_settings("ntl", self.args.token_loss_settings)["weight"] is not None
        of_ce = sums["ce"] if weighs_ce else 0.0
        return of_ce + (sums["token_loss"] - of_ce) * sums.get("tokens", 0.0) / max(numbers, 1.0)

    def _count_tokens(self) -> int:
        """The tokens seen in training by all processes until now. A collective."""
        self._total_train_tokens += int(self._sums["train"].take(self.accelerator, "num_tokens").get("num_tokens", 0))
        return self._total_train_tokens

    def _measure_speed(self) -> dict[str, float]:
        """tokens_per_second and peak_memory_gib since the last call; on a known GPU, mfu in percent."""
        rate = self._clock.read(self._total_train_tokens)
        speed = {"tokens_per_second": rate, "peak_memory_gib": peak_memory_gib(self.accelerator.device)}
        if self.accelerator.device.type == "cuda":
            precision = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else "float32"
            peak = get_peak_flops(torch.cuda.get_device_name(self.accelerator.device), precision)
            flops = training_flops_per_token(self._base_model(), self.args.max_length or 1024)
            if peak is not None and flops is not None:
                speed["mfu"] = 100 * flops * rate / (peak * self.accelerator.num_processes)
        return {name: value for name, value in speed.items() if math.isfinite(value)}

    def record_effective_rank(self) -> None:
        self._metrics["train"]["effective_rank"].append(head_effective_rank(self._base_model()))

    def restart_clock(self) -> None:
        self._clock.restart(self._total_train_tokens)

    def pause_clock(self) -> AbstractContextManager[None]:
        """Leave the time of a block out of tokens_per_second, which is the throughput of training."""
        return self._clock.paused()

    # -- held-out rows ------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, *args, **kwargs):
        return count_stream(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args, **kwargs):
        return count_stream(super().get_test_dataloader(*args, **kwargs))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys: list[str] | None = None):
        """SFTTrainer's, on the rows that no other process has had."""
        # 1. rows that only complete the last batch train nothing, and so count nothing
        inputs = self._prepare_inputs(inputs)
        if not self._shares_rows:
            mask_repeated_rows(inputs, self.accelerator)
        labels = inputs.get("labels")

        # 2. the figures of SFTTrainer's own loss, of which it keeps a mean for each batch
        loss, logits, gathered_labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not self._measures_mce and labels is not None and loss is not None:
            tokens = (labels[:, 1:] != -100).sum().double()
            self._eval_batches.append(torch.stack([tokens, torch.where(tokens > 0, loss * tokens, 0.0)]))
        return loss, logits, gathered_labels

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        """Trainer's, with token-weighted means in place of means over batches.

        Those of a named evaluation set are `eval_NAME_ce` and so on; those that SFTTrainer logs without the name are
        logged as it does, too.
        """
        # 1. nothing may be left of an evaluation that failed, or of predict(), which logs nothing
        self._sums["eval"].clear()
        self._metrics["eval"].clear()
        self._eval_batches.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

        # 2. the means over all batches and processes
        assert output.metrics is not None
        loss = output.metrics.get(f"{metric_key_prefix}_loss")
        if loss is None:  # no batch, or no labels
            return output
        if self._measures_mce:
            means = self._take_means("eval")
            means["loss"] = means.get("token_loss", means["ce"]) + self.args.mce_weight * means["mce"]
            means["loss"] += self.router_aux_loss_coef * means.get("aux_loss", 0.0)
        else:
            means = self._means_of_sft_trainer(loss)
        means["num_tokens"] = self._count_tokens()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})

        # 3. what SFTTrainer logs, under its names
        own = ("entropy", "mean_token_accuracy", "aux_loss", "num_tokens")
        self._metrics["eval"].update({name: [means[name]] for name in own if name in means})
        return output

    def _means_of_sft_trainer(self, loss: float) -> dict[str, float]:
        """Token-weighted means where the matrix head measures nothing. A collective.

        Args:
            loss: Trainer's mean over batches. It stays where the caller computes the loss: only he knows by what it is
                divided; and where several processes share rows.
        """
        if self._shares_rows or not self._eval_batches:
            return {"loss": loss}
        tokens, summed = self.accelerator.reduce(torch.stack(self._eval_batches, dim=1), "sum").tolist()
        means = {
            name: weighted_mean(values, tokens if name in ("entropy", "mean_token_accuracy") else None)
            for name, values in self._metrics["eval"].items()
        }
        means["loss"] = loss if self.compute_loss_func is not None else sum(summed) / max(sum(tokens), 1.0)
        if self._trains_cross_entropy:
            means["ce"] = means["loss"] - self.router_aux_loss_coef * means.get("aux_loss", 0.0)
        return means

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.pause_clock():
            return super().evaluate(*args, **kwargs)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _add_missing_files(self, staged: Path, final: Path) -> None:
        """Add what Trainer leaves out of a sharded checkpoint: the configuration and the tokenizer."""
        super()._add_missing_files(staged, final)
        if (staged / "config.json").is_file() or is_peft_model(self.accelerator.unwrap_model(self.model)):
            return
        model = self._base_model()  # sharded by FSDP
        model.config.save_pretrained(staged)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(staged)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(staged)
        self._add_older_names(staged)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._add_older_names(Path(output_dir or str(self.args.output_dir)))

    def rehearse_saving(self, *, read_back: bool = True) -> None:
        """Save and read back all but the weights: what would fail after training fails before its first step.

        The first process tries, as it is the one that will write these files. A collective.

        Raises:
            RecipeError: something cannot be saved, or (with read_back) is not the same when it is read back.
            NotRehearsedError: the temporary folder cannot be written.
        """
        errors: list[RecipeError | None] = [None]
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            try:
                rehearse_saving(model, self.processing_class, self.args, read_back=read_back)
            except RecipeError as error:
                errors = [type(error)(str(error))]  # without its cause, which may not be fit to be sent
        if self.accelerator.num_processes > 1:
            distributed.broadcast_object_list(errors)
        if errors[0] is not None:
            raise errors[0]
        self._rehearsed = True

    def _add_older_names(self, folder: Path) -> None:
        tokenizer = self.processing_class if isinstance(self.processing_class, PreTrainedTokenizerBase) else None
        try:
            add_older_names(folder, tokenizer, use_cache=self._base_use_cache)
        except Exception as error:  # the folder is complete without these names, and worth more than they are
            logger.warning("%s: transformers 4.57 may read it differently: %r", folder, error)

    def _save_window(self, folder: Path) -> None:
        """Save this process's sums since the last log, so that a resumed run logs what an uninterrupted one does."""
        window = {
            "tokens": self._total_train_tokens,
            "last_logged": self._globalstep_last_logged,
            "loss": float(self._tr_loss),
            "sums": self._sums["train"].state(),
            "metrics": {name: [float(value) for value in values] for name, values in self._metrics["train"].items()},
        }
        (folder / WINDOW.format(self.args.process_index)).write_text(json.dumps(window), encoding="utf-8")

    def restore_window(self) -> None:
        """Restore the sums of the checkpoint that this run resumed from, if there is one."""
        file = Path(self._resumed_from or "", WINDOW.format(self.args.process_index))
        if self._resumed_from is None or not file.is_file():
            return
        try:
            window = json.loads(file.read_text(encoding="utf-8"))
            self._total_train_tokens = window["tokens"]
            self._globalstep_last_logged = window["last_logged"]
            self._tr_loss = torch.tensor(window["loss"], device=self.args.device)
            self._total_loss_scalar = -window["loss"]  # the summary's train_loss is over the steps of this call
            self._sums["train"].restore(window["sums"], self.args.device)
            self._metrics["train"].update(window["metrics"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{file} cannot be read: {one_line(error)}. Resume from another one.") from error

    # -- guards -------------------------------------------------------------------------------------------------------

    def _check_finite(self, loss: Tensor, mode: str) -> None:
        """Stop all processes if the loss of any is NaN or infinite.

        Before the backward pass, since DeepSpeed steps inside it. All together, since one that stopped alone would
        leave the others waiting for its gradients.
        """
        if mode == "eval":
            return

        # 1. does any process see a non-finite loss?
        bad = (~torch.isfinite(loss.detach())).float().reshape(1)
        several = self.accelerator.num_processes > 1
        if several:
            distributed.all_reduce(bad, distributed.ReduceOp.MAX)
        if not bad:
            return

        # 2. which losses, on which rows, and what to resume from
        here = [(loss.item(), None if self._row_ids is None else self._row_ids.tolist())]
        found = [each for each in (gather_object(here) if several else here) if not math.isfinite(each[0])]
        rows = [row for _, rows in found for row in rows or []]
        what = (
            f"The loss is {found[0][0]} at step {self.state.global_step + 1}, on the data rows "
            f"{rows or 'unknown (packed, or no row_id)'}."
        )
        if self._survives_overflow:
            if not self._overflowed:
                logger.warning("%s float16 overflowed, and plain SFT goes on, as in SFTTrainer.", what)
            self._overflowed = True
            return
        last = last_complete_checkpoint(Path(str(self.args.output_dir)))
        way_out = f"resume from {last}" if last else "no checkpoint was written yet"
        raise NonFiniteLossError(
            f"{what} The optimizer has not stepped, {way_out}. Look at these rows, lower learning_rate, or set "
            "max_grad_norm."
        )

    @property
    def _survives_overflow(self) -> bool:
        """Whether a loss that is not finite is left to SFTTrainer's ways: in float16, where a large number overflows.

        A GradScaler leaves such a step out. The command line stops nevertheless.
        """
        in_float16 = self.args.fp16 or self._base_model().dtype == torch.float16
        return not self.args.uses_matrix_head and in_float16 and not self.stops_at_overflow

    def check_packing(self) -> None:
        """Refuse a model that lets packed rows see each other, through the engine that trains it."""
        if not self.padding_free or self._matrix_head is None:
            return
        base = self._base_model()
        check_isolation(
            self.model_wrapped,
            self.data_collator,
            self._prepare_inputs,
            vocabulary=base.config.get_text_config().vocab_size,
            half=self.args.bf16 or self.args.fp16 or base.dtype != torch.float32,
            description=f"{type(base).__name__} with attn_implementation={base.config._attn_implementation!r}",
            more=self._teacher_states,
        )
        if isinstance(self._teacher, TeacherModel):
            check_isolation(
                self._teacher.model,
                self.data_collator,
                self._prepare_inputs,
                vocabulary=base.config.get_text_config().vocab_size,
                half=True,
                description=f"the teacher {self.args.teacher_model_name_or_path!r}",
            )


# Tools read signatures to see what a version of the trainer takes
for _name in ("train", "evaluate", "get_eval_dataloader", "get_test_dataloader"):
    getattr(MatrixTrainer, _name).__signature__ = inspect.signature(getattr(SFTTrainer, _name))
