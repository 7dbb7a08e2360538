"""Which values a setting may take: its type, its range and its choices.

A dataclass states the allowed values where it declares the field, and explains the field underneath:

    mce_weight: float = setting(1.0, at_least=0)
    \"\"\"Weight of the MCE term; 0 trains on cross-entropy alone.\"\"\"

`check_value` converts and checks one value of a recipe or the command line, `check_fields` an object built in Python.
"""

import contextlib
import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.safe_yaml import read_yaml

# ------------------------------------------------------------------------------------------------ ranges and choices


@dataclass(frozen=True)
class Range:
    """A range of finite numbers.

    >>> 1.0 in Range(at_least=0, below=1), str(Range(at_least=0, below=1))
    (False, 'at least 0 and below 1')
    """

    above: float | None = None
    """Lower bound, excluded; None: no such bound."""
    at_least: float | None = None
    """Lower bound, included; None: no such bound."""
    below: float | None = None
    """Upper bound, excluded; None: no such bound."""
    at_most: float | None = None
    """Upper bound, included; None: no such bound."""
    or_else: float | None = None
    """One number outside the bounds that is also allowed."""
    note: str = ""
    """Added after the bounds in an error message: where they come from, or what `or_else` means."""

    def __contains__(self, number: float) -> bool:
        if number == self.or_else:
            return True
        return (
            (isinstance(number, int) or math.isfinite(number))  # isfinite overflows on a huge integer
            and (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.below is None or number < self.below)
            and (self.at_most is None or number <= self.at_most)
        )

    def __str__(self) -> str:
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        text = " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
        text += f", or {self.or_else}" if self.or_else is not None else ""
        return text + (f" ({self.note})" if self.note else "")


def setting(default: Any, *, choices: Iterable[str] = (), **bounds: Any) -> Any:
    """A dataclass field that states its allowed values: `choices`, or the bounds of a `Range`."""
    metadata = _FieldMetadata(choices=list(choices), range=Range(**bounds))
    return dataclasses.field(default=default, metadata=metadata)


class _FieldMetadata(dict):
    """What a field knows about its values. HfArgumentParser and TrlParser hand a copy of it to argparse, as keywords:
    so the items are what argparse understands, without an empty list of choices, which would refuse every value. The
    range is looked up like an item, and is in no copy."""

    def __init__(self, choices: list[str], range: Range) -> None:
        super().__init__({"choices": choices} if choices else {})
        self._range = range

    def __missing__(self, key: str) -> Any:
        if key == "range":
            return self._range
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self._range if key == "range" else super().get(key, default)

    def __contains__(self, key: object) -> bool:
        return key == "range" or super().__contains__(key)


_POSITIVE, _NOT_NEGATIVE, _COUNT = Range(above=0), Range(at_least=0), Range(at_least=1)
_FRACTION = Range(at_least=0, below=1)
_SEED = Range(at_least=0, at_most=2**32 - 1)  # NumPy's

# transformers.TrainingArguments and trl.SFTConfig declare these without a range, and would accept any number.
# The table is here rather than in config.py because image recipes are checked against it too.
INHERITED_RANGES = {
    # steps and batches
    "num_train_epochs": _POSITIVE,
    "max_steps": Range(at_least=1, or_else=-1, note="num_train_epochs decides"),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_length": _COUNT,
    "pad_to_multiple_of": _COUNT,
    # optimizer
    "learning_rate": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _FRACTION,
    "adam_beta2": _FRACTION,
    "adam_epsilon": _POSITIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "label_smoothing_factor": _FRACTION,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    # logging and saving
    "logging_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "eval_accumulation_steps": _COUNT,
    "save_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    # seeds and processes
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "dataset_num_proc": _COUNT,
}

# Declared as text alone, although true and false mean something too: the last checkpoint and none, all shards and none
INHERITED_TYPES: dict[str, Any] = dict.fromkeys(["resume_from_checkpoint", "fsdp"], str | bool | None)


def check_choice(key: str, value: Any, choices: Sequence[str], also: str = "") -> None:
    """Raise RecipeError with the nearest choice. `also` names, in words, what else is allowed."""
    if value not in choices:
        also = f", or {also}" if also else ""
        allowed = ", ".join(map(str, choices))
        raise RecipeError(f"{key}={value!r} is not one of {allowed}{also}.{nearest(value, choices)}")


def nearest(name: Any, names: Iterable[str]) -> str:
    """ " Did you mean ...?" with the names closest to `name`, or "" where none is close."""
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


# -------------------------------------------------------------------------------------------------------------- YAML


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a number, as YAML 1.2 and JSON do, at any depth. To YAML 1.1 it is a text."""


YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_numbers(value: Any) -> Any:
    """`value` with every text that spells a number, at any depth, as that number.

    >>> read_numbers({"min_lr": "1e-6", "mode": "max", "milestones": ["5", 7]})
    {'min_lr': 1e-06, 'mode': 'max', 'milestones': [5, 7]}
    """
    if isinstance(value, dict):
        return {key: read_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [read_numbers(each) for each in value]
    if not isinstance(value, str):
        return value
    number = read_yaml(value, YamlLoader) if re.fullmatch(r"[-+.\deE]+", value.strip()) else None
    return number if type(number) in (int, float) else value


# ------------------------------------------------------------------------------------------------------------- types

TYPE_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
    type(None): "null",
}

# The order in which the types of a setting are tried: "64" is an integer before it is a text.
_TRIED: list[type] = [type(None), bool, int, float, dict, list, tuple, enum.Enum, str, object]


def alternatives(annotation: Any) -> list[Any]:
    """The types an annotation allows: `int | str | None` -> [int, str, NoneType]; of a Literal, its values' types."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for each in typing.get_args(annotation) for kind in alternatives(each)]
    if typing.get_origin(annotation) is typing.Literal:
        return [type(each) for each in typing.get_args(annotation)]
    return [annotation]


def _class_of(kind: Any) -> type:
    """`list[str]` -> list"""
    return typing.get_origin(kind) or kind


def type_name(kind: Any) -> str:
    return TYPE_NAMES.get(_class_of(kind), _class_of(kind).__name__)


def _parse_word(word: str, cls: Any, text_allowed: bool) -> Any:
    """Parse a command-line word as YAML into `cls`; keep it as text where text is allowed and more likely."""
    if cls in (list, tuple) and not word.startswith("["):
        if text_allowed and not re.fullmatch(r"[\w.-]+(, *[\w.-]+)+", word):
            return word
        return [part.strip() for part in word.split(",")]  # --lora_target_modules q_proj,v_proj
    if cls is type(None) and word.lower() == "none" and not text_allowed:
        return None
    return read_yaml(word, YamlLoader)


def _convert(value: Any, kind: Any, from_text: bool, text_allowed: bool) -> Any:
    """`value` as `kind`, or ValueError."""
    cls = _class_of(kind)
    if from_text and cls in (bool, dict, list, tuple, type(None)):
        value = _parse_word(value, cls, text_allowed)
    if cls is dict and isinstance(value, str) and value.lstrip().startswith("{"):
        value = read_yaml(value, YamlLoader)  # a mapping in quotes
    # YAML 1.1 reads 2e-5 as text, so text that spells a number is accepted where a number is wanted.
    if cls is int and isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if cls is float and (isinstance(value, str) or type(value) in (int, float)):
        return value if type(value) is int else float(value)
    if issubclass(cls, enum.Enum) and isinstance(value, str):
        return cls(value).value
    if cls in (list, tuple) and isinstance(value, (list, tuple)):
        element = next(iter(typing.get_args(kind)), str)
        return cls(_convert_element(each, element) for each in value)
    if cls in (bool, int, str, dict, type(None)) and type(value) is cls:  # not isinstance: True is an int in Python
        return value
    raise ValueError


def _convert_element(value: Any, element: Any) -> Any:
    """`value`, of a list, as the first of the element's types that takes it, or ValueError."""
    *others, last = alternatives(element)
    for kind in others:
        with contextlib.suppress(ValueError, TypeError):
            return _convert(value, kind, False, text_allowed=kind is str)
    return _convert(value, last, False, text_allowed=last is str)


# ------------------------------------------------------------------------------------------------------------ checks


def check_value(key: str, value: Any, field: dataclasses.Field, annotation: Any, *, from_text: bool = False) -> Any:
    """Convert a value to the type that `annotation` asks for, and check it against the field's range and choices.

    Args:
        from_text: the value is a command-line word that has not been parsed yet.

    Raises:
        RecipeError: another type, out of range, or not among the choices.
    """
    # 1. The types and the choices that the dataclass allows
    kinds = alternatives(INHERITED_TYPES.get(key, annotation))
    enums = [kind for kind in kinds if issubclass(_class_of(kind), enum.Enum)]
    if enums:  # transformers writes `SchedulerType | str`, and means one of SchedulerType's values
        kinds = [kind for kind in kinds if kind is not str]
    kinds.sort(key=lambda kind: [issubclass(_class_of(kind), each) for each in _TRIED].index(True))
    choices = [each.value for kind in enums for each in kind] or list(field.metadata.get("choices", []))

    # 2. The first type that takes the value
    if value is False and "no" in [*choices, field.default]:
        value = "no"  # YAML 1.1 reads a bare `no` as False: eval_strategy: no
    for kind in kinds:
        try:
            result = _convert(value, kind, from_text, text_allowed=str in kinds)
            break
        except (ValueError, TypeError, yaml.YAMLError):
            continue
    else:
        if choices:
            check_choice(key, value, choices)
        wanted = " or ".join(dict.fromkeys(map(type_name, [*kinds[1:], kinds[0]] if kinds[0] is type(None) else kinds)))
        quotes = " Put it in quotes." if str in kinds and isinstance(value, (int, float)) else ""
        raise RecipeError(f"{key}={value!r} is {type_name(type(value))}, but {key} must be {wanted}.{quotes}")

    # 3. Range and choices
    if choices and result is not None:
        check_choice(key, result, choices)
    allowed = field.metadata.get("range", INHERITED_RANGES.get(key, Range()))
    if type(result) in (int, float) and result not in allowed:
        raise RecipeError(f"{key}={result!r} cannot work: it must be {str(allowed) or 'finite'}.")
    return result


def check_fields(settings: Any) -> None:
    """Convert and check the fields of a dataclass that were declared with `setting`, in place.

    Settings from a recipe have already been checked; this is for those given in Python.
    """
    annotations = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        if "range" in field.metadata:
            value = getattr(settings, field.name)
            if isinstance(value, np.generic):  # a sweep over np.linspace gives numpy's scalars
                value = value.item()
            setattr(settings, field.name, check_value(field.name, value, field, annotations[field.name]))
