"""Model and tokenizer: loaded or built from scratch, with one vocabulary, one set of special tokens, and float32 master weights.

Three things go wrong in silence elsewhere and are settled here: transformers 5 takes the checkpoint's dtype, so bf16 checkpoints would
train with bf16 master weights; a new pad token grows the vocabulary; and a tokenizer may know ids that the embedding has no row for.
"""

import dataclasses
import difflib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from matrix_llm.base.errors import RecipeError
from matrix_llm.config import ModelArguments

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.get_logger(__name__)

LEGACY_CONFIG_KEYS = {
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
}  # still understood, though no fields of the configuration classes


# ------------------------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2's splitting) with <s>, </s>, <pad> as ids 0, 1, 2; it puts <s> in front, and loses no character.

    "12 pens" -> <s> "12" " pens", where the training text has both often enough
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(
    args: ModelArguments,
    *,
    texts: Iterable[str] | None = None,
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right, with a pad token that costs no new embedding row; `texts` are what a new one is trained on."""
    if args.tokenizer_vocab_size is not None:
        if texts is None:
            raise RecipeError(
                f"tokenizer_vocab_size={args.tokenizer_vocab_size} trains a tokenizer, but no training texts came with it."
            )
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts, args.tokenizer_vocab_size)
    else:
        tokenizer = _pretrained_tokenizer(args, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"the tokenizer of {args.tokenizer_name_or_path or args.model_name_or_path!r} has no end-of-text token, so a model could not "
            "learn where to stop. Set eos_token in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token_id is not None else tokenizer.eos_token
        logger.warning_once(
            f"the tokenizer has no pad token: {tokenizer.pad_token!r} pads (no vocabulary row added, never trained on)."
        )
    tokenizer.padding_side = "right"  # CodeLlama pads left, which shifts positions in training
    if chat_template_path is not None:
        if not (file := Path(chat_template_path).expanduser()).is_file():
            raise RecipeError(
                f"chat_template_path={chat_template_path!r}: no file at {file.absolute()}. Give a Jinja file."
            )
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def _pretrained_tokenizer(args: ModelArguments, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    name = args.tokenizer_name_or_path or args.model_name_or_path
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if args.tokenizer_name_or_path is None:
        options["revision"] = args.model_revision
    tokenizer = _load("tokenizer", name, AutoTokenizer.from_pretrained, **options)
    if args.model_name_or_path is not None:
        rows = _config(args, trust_remote_code).get_text_config().vocab_size
        # CodeLlama's class adds <FILL_ME> behind the vocabulary. It is a marker for infilling calls, and can be left out.
        if _beyond(tokenizer, rows) and getattr(tokenizer, "fill_token", None) is not None:
            tokenizer = _load("tokenizer", name, AutoTokenizer.from_pretrained, fill_token=None, **options)
        _check_vocabulary(tokenizer, rows)
    return tokenizer


def _beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    return {token: i for token, i in tokenizer.get_vocab().items() if i >= rows} if len(tokenizer) > rows else {}


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    if beyond := _beyond(tokenizer, rows):
        shown = ", ".join(f"{token!r} (id {i})" for token, i in sorted(beyond.items(), key=lambda item: item[1])[:5])
        raise RecipeError(
            f"the tokenizer knows {len(beyond)} tokens beyond the model's {rows} embedding rows: {shown}. The vocabulary never grows in "
            "silence. Use the model's own tokenizer, take them out of its tokenizer.json, or resize the checkpoint on purpose beforehand."
        )


# ---------------------------------------------------------------------------------------------------------------------- model


def load_model(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int = 42, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model in args.dtype, from a checkpoint, or with random weights under `seed`; its special ids are the tokenizer's."""
    options: dict[str, Any] = {"dtype": args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    if args.model_config is not None:
        if options["dtype"] == "auto":
            options["dtype"] = torch.float32
        config = build_config(args, tokenizer)
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    else:
        if args.load_in_4bit:
            options |= _four_bit()
        name = args.model_name_or_path
        options |= {"revision": args.model_revision, "trust_remote_code": trust_remote_code}
        model = _load("model", name, AutoModelForCausalLM.from_pretrained, **options)
    embeddings = model.get_input_embeddings()
    if isinstance(
        rows := getattr(embeddings, "num_embeddings", None), int
    ):  # the attribute: under ZeRO-3 the weight itself is empty here
        _check_vocabulary(tokenizer, rows)
    _agree(model, tokenizer)
    return model


def build_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration of a from-scratch model. Strict: transformers stores a misspelt key and ignores it, this names the nearest."""
    settings = dict(args.model_config or {})
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"model_config: no architecture is called {model_type!r}.{_nearest(model_type, list(CONFIG_MAPPING))}"
        )
    config_class = CONFIG_MAPPING[model_type]
    known = set(config_class().to_dict()) | set(config_class.attribute_map) | LEGACY_CONFIG_KEYS
    if dataclasses.is_dataclass(config_class):
        known |= {field.name for field in dataclasses.fields(config_class)}
    for key in settings:
        if key not in known:
            raise RecipeError(
                f"model_config: {key!r} is not a setting of a {model_type} model.{_nearest(key, sorted(known))}"
            )
    rows = settings.setdefault("vocab_size", len(tokenizer))
    if rows < len(tokenizer):
        raise RecipeError(
            f"model_config: vocab_size={rows} has fewer rows than the tokenizer has tokens ({len(tokenizer)}). Remove vocab_size: it then "
            "follows the tokenizer."
        )
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        return AutoConfig.for_model(model_type, **{**settings, **ids})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(f"model_config: {' '.join(str(error).split())}") from None


def load_config(
    args: ModelArguments, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration alone, of a checkpoint or from scratch: what a plan needs, without a weight."""
    return build_config(args, tokenizer) if args.model_config is not None else _config(args, trust_remote_code)


def _agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model's configuration and its generation settings name the tokenizer's special ids, so that generate() stops and pads alike."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        wanted = getattr(tokenizer, name)
        for config in (model.config.get_text_config(), model.generation_config):
            if config is None:
                continue
            present = getattr(config, name, None)
            if isinstance(present, list) and wanted in present:  # Llama 3 stops at either of two ids
                continue
            setattr(config, name, wanted)


def _config(args: ModelArguments, trust_remote_code: bool) -> PretrainedConfig:
    name = args.model_name_or_path
    return _load(
        "model", name, AutoConfig.from_pretrained, revision=args.model_revision, trust_remote_code=trust_remote_code
    )


def _load(what: str, name: str | None, loader: Any, **options: Any) -> Any:
    """loader(name), with the many ways of not finding it told in one line."""
    key = "tokenizer_name_or_path" if what == "tokenizer" else "model_name_or_path"
    path = os.path.expanduser(str(name))
    if str(name).startswith((".", "/", "~")) and not os.path.isdir(path):
        raise RecipeError(f"{key}={name!r}: no folder at {os.path.abspath(path)}. Correct the path.")
    try:
        return loader(path if os.path.isdir(path) else name, **options)
    except (OSError, ValueError, KeyError) as error:  # the Hub client's errors are OSErrors
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = (
            "is a folder, but cannot be read"
            if os.path.isdir(path)
            else "is no folder here, and the Hub does not give it"
        )
        raise RecipeError(
            f"{key}={name!r} {where}: {said} Correct the name, log in, or download it first and give the folder."
        ) from error


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


# ----------------------------------------------------------------------------------------------------------------------- LoRA


def lora_config(args: ModelArguments) -> "LoraConfig | None":
    """peft.LoraConfig of the lora_* settings, or None without use_peft."""
    if not args.use_peft:
        return None
    if importlib.util.find_spec("peft") is None:
        raise ImportError("use_peft=True needs the package peft, which is not installed. Run: pip install peft")
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        modules_to_save=args.lora_modules_to_save,
    )


def _four_bit() -> dict[str, Any]:
    """from_pretrained's options for QLoRA: NF4 with double quantisation, computed in bf16, each process on its own GPU."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "load_in_4bit=True needs the package bitsandbytes, which is not installed. Run: pip install bitsandbytes"
        )
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": quantization, "device_map": {"": PartialState().local_process_index}}
