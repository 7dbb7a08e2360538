"""From a .gguf file to a plain folder: its weights out of their blocks, in float32, with tokenizer and chat template.

float32 holds every dequantised value exactly; bfloat16 would round them once more. The file is untrusted: its header is
checked first (header.py), it is read in an otherwise empty folder, so that no configuration beside it is taken for its
own, and its chat template is saved and not run.
"""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from matrix_llm.base.errors import FetchError, one_line
from matrix_llm.checks.machine import require
from matrix_llm.fetch.header import Header, read_header
from matrix_llm.fetch.tokenizer import load_gguf_tokenizer
from matrix_llm.model.older_readers import add_older_names

BYTES = 4  # of a float32
LARGEST = 16_777_216  # the longest context that is known is 10 million tokens
NAME = "model.gguf"  # in the folder that transformers reads it from
# tensors that hold the frequencies of scaled rotary embeddings, not weights
FREQUENCIES = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def find_gguf(path: Path) -> Path:
    """`path` if it is a file; of a folder, the one .gguf file in it.

    Raises:
        FetchError: the folder has none, or several; or it is one part of a model.
    """
    file = path
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not found and (path / "config.json").is_file():
            raise FetchError(f"{str(path)!r} is a plain model already. Give it to train and eval as it is.")
        if not found:
            raise FetchError(f"{str(path)!r} holds no .gguf file. Give the path of one, or of a folder with one.")
        if len(found) > 1:
            names = ", ".join(each.name for each in found[:8]) + (" ..." if len(found) > 8 else "")
            raise FetchError(f"{str(path)!r} holds {len(found)} .gguf files: {names}. Give the path of one.")
        file = found[0]
    if part := re.search(r"-(\d{5})-of-(\d{5})\.gguf$", file.name):
        number, parts = int(part[1]), int(part[2])
        if parts > 1:
            raise FetchError(
                f"{str(file)!r} is part {number} of {parts}, and transformers reads whole models only. Join the parts "
                f"with llama.cpp's `llama-gguf-split --merge`, and give the result."
            )
    return file


def check_gguf(file: Path) -> Header:
    """The header of a file that can be converted here: all that can be refused before weights are read.

    Raises:
        FetchError: damaged, one part of several, or too large for the memory.
    """
    require("gguf", "reading a .gguf file")
    header = read_header(file)
    if (parts := header.metadata.get("split.count", 1)) != 1:
        raise FetchError(
            f"{str(file)!r} is one part of {parts}. Join them with llama.cpp's `llama-gguf-split --merge` first."
        )
    _check_sizes(file, header)
    needed, free = 2 * BYTES * header.values, psutil.virtual_memory().available
    if needed > free:
        raise FetchError(
            f"{str(file)!r} holds {header.values:,} weights: making a float32 folder of them takes about "
            f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free. Use a larger machine."
        )
    return header


def _check_sizes(file: Path, header: Header) -> None:
    """Refuse sizes that no model has: buffers of them would fill the memory before any weight is compared."""
    for key, value in header.metadata.items():
        most = len(header.tensors) if key.endswith(".block_count") else LARGEST
        is_size = key.startswith(f"{header.architecture}.") and isinstance(value, int)
        if is_size and not 0 <= value <= most:
            raise FetchError(f"{str(file)!r} claims {key} = {value:,}, which does not fit its tensors. Give another.")


def convert(file: Path, header: Header, work: Path, folder: Path) -> None:
    """Write the model of `file` to `folder`.

    Args:
        header: of `file`, from `check_gguf`.
        work: an empty folder for temporary files.

    Raises:
        FetchError: transformers cannot read it, or only a part of it.
    """
    (work / NAME).symlink_to(file.absolute())
    # 1. configuration, then the tokenizer: both may be refused before weights are read
    config = _load_config(work, header)
    tokenizer = load_gguf_tokenizer(work, NAME, header, getattr(config, "max_position_embeddings", None))
    # 2. weights
    model = _load_weights(work, header)
    # 3. a plain model of them
    plain = _without_quantisation(model, tokenizer)
    plain.generation_config = _generation_settings(tokenizer, header)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    add_older_names(folder, tokenizer)


def _load_config(work: Path, header: Header) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(str(work), gguf_file=NAME)
    except Exception as error:  # whatever an untrusted file leads the library into
        raise FetchError(
            f"a .gguf file of the architecture {header.architecture!r} cannot be read: {one_line(error)}. Fetch the "
            "model's own files (user/name on the Hub) instead."
        ) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FetchError(f"a {config.model_type} model is not a causal language model. Give a .gguf file of one.")
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    is_scaled = scaling != "none" or not FREQUENCIES.isdisjoint(header.tensors)
    if is_scaled and "default" in (rope.get("rope_type"), (rope.get("full_attention") or {}).get("rope_type")):
        raise FetchError(
            "the file scales its rotary embeddings (rope.scaling.type or rope_freqs.weight), which transformers does "
            "not read from .gguf files. Fetch the model's own files (user/name on the Hub) instead."
        )
    return config


def _load_weights(work: Path, header: Header) -> PreTrainedModel:
    """The model in float32, every weight of it from the file, and every weight of the file in it."""
    loader: Any = AutoModelForCausalLM
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is refused below
    try:
        model, said = loader.from_pretrained(
            str(work), gguf_file=NAME, dtype=torch.float32, output_loading_info=True,
            quantization_config=GgufConfig(dequantize=True),
        )  # fmt: skip
    except Exception as error:  # whatever an untrusted file leads the library into
        raise FetchError(
            f"transformers cannot read the weights of the .gguf file: {one_line(error)}. Give another file."
        ) from None
    finally:
        logging.set_verbosity(before)
    if missing := sorted(said["missing_keys"]):
        raise FetchError(f"the .gguf file holds no {missing[0]} ({len(missing)} missing weights). Give another file.")
    found = sum(parameter.numel() for parameter in model.parameters())
    held = header.values - sum(np.prod(t.shape) for name, t in header.tensors.items() if name in FREQUENCIES)
    if found != held:
        raise FetchError(
            f"the .gguf file holds {held:,} weights, and transformers has a place for {found:,} of them: the rest, "
            "such as biases, would be dropped. Fetch the model's own files (user/name on the Hub) instead."
        )
    return model


def _without_quantisation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The same weights in a model that can be saved: transformers still calls this one quantised."""
    settings = _rounded(model.config.to_dict())
    for key in ("quantization_config", "unk_token_id", "architectures", "transformers_version", "dtype"):
        settings.pop(key, None)
    settings |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}  # _name_or_path is a title
    config = type(model.config)(**settings)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        plain.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = one_line(ValueError(lines[min(1, len(lines) - 1)]))
        raise FetchError(f"the .gguf file's header does not fit its weights: {reason}. Give another file.") from None
    plain.tie_weights()
    return plain


def _rounded(value: Any) -> Any:
    """Numbers that are a float32 (9.999999747378752e-06) as their shortest decimal (1e-05), which is the same float32.

    >>> _rounded({"eps": 9.999999747378752e-06, "theta": 100000.0})
    {'eps': 1e-05, 'theta': 100000.0}
    """
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, float) and isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _generation_settings(tokenizer: PreTrainedTokenizerBase, header: Header) -> GenerationConfig:
    """Where generation stops: at the end of the text, and at the end of a turn where the file names one."""
    stops = [tokenizer.eos_token_id, header.metadata.get("tokenizer.ggml.eot_token_id")]
    stops = [token for token in dict.fromkeys(stops) if isinstance(token, int) and 0 <= token < len(tokenizer)]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stops if len(stops) > 1 else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def size_of(header: Header) -> int:
    """Bytes of the folder's weights."""
    return BYTES * header.values
