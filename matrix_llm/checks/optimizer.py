"""The optimizer and the learning-rate schedule of a recipe, built for one small layer before anything is loaded.

transformers builds both at the first step, and then a wrong argument is a traceback after minutes of loading. Worse,
its optimizers read the arguments that they know and drop the others: `optim: sgd` with `optim_args: momentm=0.9` has
no momentum. Whether an argument is read shows when its value is changed.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.checks.machine import MissingOnThisMachineError

_PLANNED_STEPS = 1000  # where only the data say how many steps there are
_IGNORE_WARMUP = (SchedulerType.CONSTANT, SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
_IGNORE_KWARGS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)


class _Layer(nn.Module):
    """Stands for the model: one linear layer, under a name that `optim_target_modules: all-linear` finds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


def check_optimizer(training: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Build the optimizer, and refuse arguments that it would drop.

    Raises:
        MissingOnThisMachineError: its package is not installed.
        RecipeError: an argument is wrong, or does nothing with this optimizer.
    """
    # 1. Does it exist, and does it take these arguments?
    settings = _optimizer_settings(training)
    # 2. Does it read each of them?
    for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if key in given and settings == _optimizer_settings(training, **{key: getattr(training, key) / 2 + 1e-9}):
            raise RecipeError(
                f"{key}={given[key]!r} does nothing with optim={_name(training.optim)!r}. Remove it, or choose an "
                "AdamW such as adamw_torch."
            )
    if "optim_target_modules" in given and settings == _optimizer_settings(training, optim_target_modules=None):
        raise RecipeError(
            f"optim_target_modules={given['optim_target_modules']!r} does nothing with "
            f"optim={_name(training.optim)!r}. Remove it, or choose a GaLore or APOLLO optimizer."
        )
    for name, value in _split(training.optim_args).items():
        _check_is_read(training, name, value)


def _check_is_read(training: TrainingArguments, name: str, value: str) -> None:
    """Refuse an argument of optim_args that changes nothing whatever it says, or that means true when it says false."""
    where = f"optim_args={training.optim_args!r} with optim={_name(training.optim)!r}"
    others = {**_split(training.optim_args)}

    def settings(text: str) -> Any:
        try:
            words = [f"{key}={each}" for key, each in {**others, name: text}.items()]
            return _optimizer_settings(training, optim_args=",".join(words))
        except RecipeError:
            return text  # it was read, and did not fit

    now = settings(value)
    if all(now == settings(text) for text in ("7", "8", "true", "false", "")):
        raise RecipeError(f"{where}: this optimizer does not read {name}. Correct the name, or remove it.")
    if value.lower() in ("false", "0", "no") and now == settings("true"):
        raise RecipeError(f"{where}: {name} is switched on by any text, {value!r} too. Remove {name} to leave it off.")


def _split(optim_args: str | None) -> dict[str, str]:
    """{"momentum": "0.9"} of "momentum=0.9", with no more care than transformers takes."""
    pairs = (each.partition("=") for each in (optim_args or "").replace(" ", "").split(",") if each)
    return {name: value for name, _, value in pairs}


def _optimizer_settings(training: TrainingArguments, **changes: Any) -> tuple[str, str]:
    """The optimizer's class and arguments, as transformers works them out, after building it once."""
    layer, settings = _Layer(), copy.copy(training)
    for key, value in changes.items():
        setattr(settings, key, value)
    if settings.optim_target_modules:
        settings.optim_target_modules = "all-linear"  # the model's own names are checked against the model
    words = f"optim={_name(training.optim)!r}"
    if training.optim_args:
        words += f" with optim_args={training.optim_args!r}"
    try:
        found, arguments = Trainer.get_optimizer_cls_and_kwargs(settings, cast(Any, layer))
        said = {key: value for key, value in arguments.items() if key not in ("params", "model", "optimizer_dict")}
        groups = arguments.pop("params", None) or list(layer.parameters())
        found(**arguments) if "model" in arguments else found(groups, **arguments)
    except ImportError as error:
        raise MissingOnThisMachineError(f"{words}: {one_line(error)}.") from None
    except Exception as error:  # whatever it is, training would end with it
        if "install" in str(error):
            raise MissingOnThisMachineError(f"{words}: {one_line(error)}.") from None
        raise RecipeError(f"{words} cannot be built: {one_line(error)}. Write name=value,name=value.") from None
    rates = [{k: v for k, v in group.items() if k != "params"} for group in groups if isinstance(group, dict)]
    return str(found), str((sorted(said.items()), rates))


def check_schedule(training: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Build the schedule, and try learning rates from the first step to the last.

    Raises:
        RecipeError: an argument is wrong or missing, or does nothing with this schedule.
    """
    kind, kwargs = SchedulerType(training.lr_scheduler_type), cast(Any, training.lr_scheduler_kwargs)
    words = f"lr_scheduler_type={kind.value!r}" + (f" with lr_scheduler_kwargs={kwargs!r}" if kwargs else "")
    # 1. What it would ignore
    if kwargs and kind in _IGNORE_KWARGS:
        raise RecipeError(f"{words}: this schedule takes none. Remove lr_scheduler_kwargs.")
    if given.get("warmup_steps") and kind in _IGNORE_WARMUP:
        way_out = " or write constant_with_warmup" if kind == SchedulerType.CONSTANT else " or choose another schedule"
        raise RecipeError(
            f"warmup_steps={given['warmup_steps']!r} does nothing with lr_scheduler_type={kind.value!r}. Remove "
            f"it,{way_out}."
        )
    # 2. Does it take these arguments, and are the rates numbers?
    steps = training.max_steps if training.max_steps > 0 else _PLANNED_STEPS
    warmup = training.get_warmup_steps(steps)
    layer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=training.learning_rate)
    try:
        scheduler = get_scheduler(kind, layer, warmup, steps, scheduler_specific_kwargs=kwargs)
        rates = _rates(scheduler, {0, 1, warmup, (warmup + steps) // 2, steps - 1})
    except Exception as error:  # whatever it is, training would end with it
        raise RecipeError(f"{words} cannot be built: {one_line(error)}. Correct lr_scheduler_kwargs.") from None
    # 3. Would it train?
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not any(rates):
        raise RecipeError(
            f"{words} gives learning rates such as {min(rates):g}, with which nothing is learned. Correct "
            "lr_scheduler_kwargs."
        )


def _rates(scheduler: Any, steps: set[int]) -> list[float]:
    """Learning rates, relative to the peak, at some steps."""
    if isinstance(scheduler, LambdaLR):
        return [float(rate(step)) for rate in scheduler.lr_lambdas for step in sorted(steps)]
    scheduler.optimizer.step()
    if isinstance(scheduler, ReduceLROnPlateau) or "Greedy" in type(scheduler).__name__:
        scheduler.step(1.0)
        scheduler.step(2.0)
    else:
        scheduler.step()
    return [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def _name(value: Any) -> str:
    return getattr(value, "value", value)
