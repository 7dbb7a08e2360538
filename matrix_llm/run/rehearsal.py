"""Saving, tried before training: a run that cannot save its files should not find out after hours."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from matrix_llm.base.errors import RecipeError, one_line
from matrix_llm.run.failures import why_not_written

GIB = 2**30


class NotRehearsedError(RecipeError):
    """There is nowhere to try saving, which says nothing about the place where the run will save."""


def rehearse_saving(model: Any, tokenizer: Any, training: TrainingArguments, *, read_back: bool = True) -> None:
    """Save all but the weights into a temporary folder, and read it back.

    Args:
        model: a model of transformers, or of PEFT; anything else is not tried.
        tokenizer: a tokenizer or a processor, or None.
        read_back: whether what is not the same when it is read back is refused as well.

    Raises:
        RecipeError: something cannot be saved or read back; one line, with the library's own reason.
        NotRehearsedError: the temporary folder cannot be written.
    """
    try:
        holder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise _no_room(error.strerror) from error
    what = ""
    try:
        with holder as folder:
            # 1. The settings, by the calls that the model's own save_pretrained makes. It may need the weights itself.
            if is_peft_model(model):
                what = "the adapter's settings"
                for settings in model.peft_config.values():
                    settings.save_pretrained(folder)
            elif isinstance(model, PreTrainedModel):
                what = "the configuration and the generation settings"
                model.config.save_pretrained(folder)
                if model.can_generate():
                    model.generation_config.save_pretrained(folder)
                if read_back:
                    _read_back(folder, model)
            # 2. The tokenizer
            if tokenizer is not None:
                what = "the tokenizer"
                tokenizer.save_pretrained(folder)
                if read_back:
                    _read_tokenizer_back(folder, tokenizer)
            # 3. The training arguments
            what = "the training arguments"
            torch.save(training, Path(folder, "training_args.bin"))
    except Exception as error:  # whatever a library raises here, it would raise after training
        if (reason := why_not_written(error)) is not None:
            raise _no_room(reason) from error
        raise _cannot_save(what, error, model) from error


def _no_room(reason: str | None) -> NotRehearsedError:
    return NotRehearsedError(
        f"the temporary folder {tempfile.gettempdir()} cannot be written: {reason}. Make room there, or set TMPDIR to "
        "another folder."
    )


def _cannot_save(what: str, error: Exception, model: Any) -> RecipeError:
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or "the model"
    return RecipeError(
        f"{what} of {name} could not be saved after training: {one_line(error)}. Correct the files of that model, "
        "or train from another folder."
    )


def _read_back(folder: str, model: Any) -> None:
    if (
        Path(folder, "config.json").is_file() and model.config.model_type in CONFIG_MAPPING
    ):  # others need the code that came with the model
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if Path(folder, "generation_config.json").is_file():
        GenerationConfig.from_pretrained(folder)


def _read_tokenizer_back(folder: str, tokenizer: Any) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not type(tokenizer).__module__.startswith("transformers."):
        return
    read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for name in ("vocab_size", "eos_token", "pad_token", "bos_token", "chat_template"):
        before, after = getattr(tokenizer, name), getattr(read, name)
        if before != after:
            raise ValueError(f"{name} is {before!r} before it is saved and {after!r} when it is read back")


def describe_space(model: torch.nn.Module, training: TrainingArguments) -> str | None:
    """A warning if output_dir's disk has less room than the run needs at least; None if it has enough."""
    # 1. what is saved: all weights, or those of the adapter; under ZeRO-3 a parameter's own size is 0
    adapter = is_peft_model(model)
    sizes = [
        (getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad)
        for p in model.parameters()
        if p.requires_grad or not adapter
    ]
    weights = sum(count * width for count, width, _ in sizes)
    # 2. AdamW's two moments; the new checkpoint is complete before an older one goes
    checkpoint = weights + sum(8 * count for count, _, trained in sizes if trained)
    checkpoints = (
        0 if str(training.save_strategy) in ("no", "SaveStrategy.NO") else (training.save_total_limit or 1) + 1
    )
    # 3. against what is there
    output = Path(str(training.output_dir)).absolute()
    free = shutil.disk_usage(next(path for path in (output, *output.parents) if path.exists())).free
    needed = weights + checkpoints * checkpoint
    if free >= needed:
        return None
    kept = f" and {checkpoints} checkpoints of about {checkpoint / GIB:.1f} GiB" if checkpoints else ""
    return (
        f"disk             {free / GIB:.1f} GiB free in {output}, but the final weights ({weights / GIB:.1f} GiB)"
        f"{kept} need {needed / GIB:.1f} GiB"
    )
