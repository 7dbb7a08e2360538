"""What a setting's value may be: its type from YAML or from a word of the command line, its range, its choices."""

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from matrix_llm.base.errors import RecipeError

# ------------------------------------------------------------------------------------------------------------------- ranges

_POSITIVE = (lambda x: x > 0, "above 0")
_COUNT = (lambda x: x >= 1, "at least 1")
_NOT_NEGATIVE = (lambda x: x >= 0, "at least 0")
_FRACTION = (lambda x: 0 <= x < 1, "at least 0 and below 1")

_RANGES = {
    **dict.fromkeys(
        ["learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "adam_epsilon"], _POSITIVE
    ),
    **dict.fromkeys(
        ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length"],
        _COUNT,
    ),
    **dict.fromkeys(["mce_steps", "mce_order", "lora_r", "lora_alpha", "save_total_limit", "dataset_num_proc"], _COUNT),
    **dict.fromkeys(
        ["max_train_rows", "max_eval_rows", "builtin_rows", "builtin_eval_rows", "accuracy_max_new_tokens"], _COUNT
    ),
    **dict.fromkeys(
        [
            "mce_weight",
            "mce_warmup_steps",
            "effective_rank_steps",
            "accuracy_rows",
            "accuracy_steps",
            "weight_decay",
            "warmup_steps",
        ],
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(["max_grad_norm", "seed", "data_seed", "dataloader_num_workers"], _NOT_NEGATIVE),
    **dict.fromkeys(["streaming_buffer", "leakage_ngram", "image_size"], _COUNT),
    **dict.fromkeys(["base_learning_rate", "probe_learning_rate"], _POSITIVE),
    "momentum": _FRACTION,
    "leakage_share": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
    **dict.fromkeys(["lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2"], _FRACTION),
    "max_steps": (lambda x: x == -1 or x >= 1, "-1 (num_train_epochs decides) or at least 1"),
    "tokenizer_vocab_size": (lambda x: x >= 260, "at least 260: 256 bytes and 3 special tokens, and one merge"),
}


def check_range(key: str, value: Any) -> None:
    if value is None or isinstance(value, (bool, str)) or key not in _RANGES:
        return
    holds, wanted = _RANGES[key]
    if not (math.isfinite(value) and holds(value)):
        raise RecipeError(f"{key}={value!r} cannot work: it must be {wanted}.")


def nearest(name: str, names) -> str:
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def check_choice(key: str, value: Any, choices: Sequence[str], also: str = "") -> None:
    if value not in choices:
        also = f", or {also}" if also else ""
        raise RecipeError(
            f"{key}={value!r} is not one of {', '.join(map(str, choices))}{also}.{nearest(value, choices)}"
        )


# ------------------------------------------------------------------------------------------------------------------ values


def alternatives(annotation: Any) -> list[Any]:
    """`int | str | None` -> [int, str, NoneType]; a Literal gives its type."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [part for each in typing.get_args(annotation) for part in alternatives(each)]
    if typing.get_origin(annotation) is typing.Literal:
        return [type(each) for each in typing.get_args(annotation)]
    return [annotation]


_ORDER: list[type] = [
    type(None),
    bool,
    int,
    float,
    dict,
    list,
    tuple,
    enum.Enum,
    str,
    object,
]  # of trying: "64" is an integer before it is a text
WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    dict: "a mapping",
    list: "a list",
    tuple: "a list",
    type(None): "null",
}


def class_of(kind: Any) -> type:
    return typing.get_origin(kind) or kind


def _from_text(text: str, origin: Any, text_allowed: bool) -> Any:
    """What a word of the command line means where `origin` is wanted; a plain text stays one where a text is allowed as well."""
    if origin in (list, tuple) and not text.startswith("["):
        if text_allowed and not re.fullmatch(r"[\w.-]+(, *[\w.-]+)+", text):
            return text
        return [part.strip() for part in text.split(",")]  # --lora_target_modules q_proj,v_proj
    if origin is type(None) and text.lower() == "none" and not text_allowed:
        return None
    return yaml.safe_load(text)


def _convert(value: Any, kind: Any, from_text: bool, text_allowed: bool) -> Any:
    """`value` as `kind`, or ValueError. YAML 1.1 reads 2e-5 as a text, so a text that spells a number is one where a number is wanted."""
    origin = class_of(kind)
    if from_text and origin in (bool, dict, list, tuple, type(None)):
        value = _from_text(value, origin, text_allowed)
    if origin is int and isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    if origin is float and (isinstance(value, str) or type(value) in (int, float)):
        return value if type(value) is int else float(value)
    if issubclass(origin, enum.Enum) and isinstance(value, str):
        return origin(value).value
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        element = next(iter(typing.get_args(kind)), str)
        return origin(_convert(each, element, False, text_allowed=element is str) for each in value)
    if origin in (bool, int, str, dict, type(None)) and type(value) is origin:  # `type is`: True is no int
        return value
    raise ValueError


def check_value(
    key: str, value: Any, where: str, from_text: bool, *, annotation: Any, setting: dataclasses.Field
) -> Any:
    """The value in the type that the dataclass wants, checked against its choices and its range."""
    kinds = alternatives(annotation)
    choices = list(setting.metadata.get("choices") or [])
    for kind in kinds:
        if issubclass(class_of(kind), enum.Enum):
            choices = [each.value for each in kind]
    if value is False and "no" in [*choices, setting.default]:
        value = "no"  # YAML 1.1 reads a bare `no` as False: eval_strategy: no
    if any(issubclass(class_of(kind), enum.Enum) for kind in kinds):
        kinds = [kind for kind in kinds if kind is not str]  # `SchedulerType | str`: the text must be one of the names
    kinds.sort(key=lambda kind: [issubclass(class_of(kind), each) for each in _ORDER].index(True))
    for kind in kinds:
        try:
            result = _convert(value, kind, from_text, text_allowed=str in kinds)
            break
        except (ValueError, TypeError, yaml.YAMLError):
            continue
    else:
        if choices:
            check_choice(f"{where}: {key}", value, choices)
        wanted = " or ".join(dict.fromkeys(WORDS.get(class_of(k), class_of(k).__name__) for k in kinds))
        hint = " Put it in quotes." if str in kinds and isinstance(value, (int, float)) else ""
        raise RecipeError(
            f"{where}: {key}={value!r} is {WORDS.get(type(value), type(value).__name__)}, but {key} must be {wanted}.{hint}"
        )
    if isinstance(result, float) and not math.isfinite(result):
        raise RecipeError(f"{where}: {key}={result!r} cannot work: it must be finite.")
    if choices and result is not None:
        check_choice(f"{where}: {key}", result, choices)
    try:
        check_range(key, result)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return result
