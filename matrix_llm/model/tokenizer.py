"""The tokenizer: loaded or trained, padding on the right, and without any token that lacks an embedding.

Two things otherwise go wrong silently: a new pad token grows the vocabulary, and a tokenizer may know ids beyond the
model's embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from matrix_llm.base.errors import RecipeError
from matrix_llm.base.values import nearest
from matrix_llm.config import ModelArguments
from matrix_llm.model.pretrained import load_pretrained, load_pretrained_config

logger = logging.get_logger(__name__)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's splitting: it loses no character, and puts <s> in front.

    <s>, </s> and <pad> are ids 0, 1 and 2.

    "12 pens" -> <s> "12" " pens", if the training text has both often enough
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
    eos_token: str | None = None,
    pad_token: str | None = None,
    read: PretrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe, ready for training.

    Args:
        args: the recipe's model settings.
        texts: what a new tokenizer (`tokenizer_vocab_size`) is trained on.
        chat_template_path: a Jinja file that replaces the tokenizer's chat template.
        eos_token: the token that ends a row, in place of the tokenizer's own; one of its vocabulary.
        pad_token: the same for padding.
        read: the configuration of `model_name_or_path`, where it has been read already.

    Raises:
        RecipeError: no tokenizer under this name, no end-of-text token, tokens without an embedding, no such template;
            or an eos_token or pad_token that the tokenizer does not know.
    """
    # 1. train it or load it
    if args.tokenizer_vocab_size is not None:
        if texts is None:
            raise RecipeError(
                f"tokenizer_vocab_size={args.tokenizer_vocab_size} trains a tokenizer, but no training texts were "
                "given."
            )
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(texts, args.tokenizer_vocab_size)
    else:
        tokenizer = _load_pretrained_tokenizer(args, trust_remote_code, read)

    # 2. special tokens and padding
    if eos_token is not None:
        _set_eos_token(tokenizer, eos_token)
    if pad_token is not None:
        _check_known(tokenizer, "pad_token", pad_token)
        tokenizer.pad_token = pad_token
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"the tokenizer of {args.tokenizer_name_or_path or args.model_name_or_path!r} has no end-of-text token, so "
            "a model could not learn where to stop. Set eos_token to one of its tokens."
        )
    if tokenizer.pad_token_id is None:  # use an existing token: a new one would need a new embedding
        tokenizer.pad_token = tokenizer.unk_token if tokenizer.unk_token_id is not None else tokenizer.eos_token
        logger.warning_once(
            f"the tokenizer has no pad token: {tokenizer.pad_token!r} pads. The vocabulary does not grow, and padding "
            "is never trained on."
        )
    tokenizer.padding_side = "right"  # CodeLlama pads left, which shifts positions in training

    # 3. chat template
    if chat_template_path is not None:
        if not (file := Path(chat_template_path).expanduser()).is_file():
            raise RecipeError(
                f"chat_template_path={chat_template_path!r}: no file at {file.absolute()}. Give a Jinja file."
            )
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def _load_pretrained_tokenizer(
    args: ModelArguments, trust_remote_code: bool, read: PretrainedConfig | None
) -> PreTrainedTokenizerBase:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if args.tokenizer_name_or_path is None:
        options["revision"] = args.model_revision
        if read is not None:
            options["config"] = load_pretrained_config(args, trust_remote_code, read)
    name = args.tokenizer_name_or_path or args.model_name_or_path
    key = "tokenizer_name_or_path" if args.tokenizer_name_or_path else "model_name_or_path"
    tokenizer = load_pretrained(key, name, AutoTokenizer.from_pretrained, **options)
    if args.model_name_or_path is not None:
        embeddings = load_pretrained_config(args, trust_remote_code, read).get_text_config().vocab_size
        # CodeLlama's class adds <FILL_ME> after the vocabulary. It marks infilling calls and is not needed here.
        if _tokens_beyond(tokenizer, embeddings) and getattr(tokenizer, "fill_token", None) is not None:
            tokenizer = load_pretrained(key, name, AutoTokenizer.from_pretrained, fill_token=None, **options)
        check_vocabulary(tokenizer, embeddings)
    return tokenizer


def _set_eos_token(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Make `token` the one that ends a row, in texts, in the saved files and where generation stops.

    Raises:
        RecipeError: the vocabulary does not hold it; or the tokenizer goes on ending texts in another one.
    """
    _check_known(tokenizer, "eos_token", token)
    before = tokenizer.eos_token_id
    tokenizer.eos_token = token
    last = tokenizer("a")["input_ids"][-1:]
    if last == [before] and before != tokenizer.eos_token_id:
        raise RecipeError(
            f"eos_token={token!r}, but the tokenizer itself ends every text in {tokenizer.decode(last)!r}, which would "
            "stand before it and at the end of prompts. Set add_eos_token to false in its tokenizer_config.json, or "
            "remove eos_token."
        )


def _check_known(tokenizer: PreTrainedTokenizerBase, key: str, token: str) -> None:
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return
    marks = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    listed = f"Its special tokens are {', '.join(sorted(marks)[:12])}. Give one of its tokens." if marks else ""
    raise RecipeError(
        f"{key}={token!r} is not in the tokenizer's vocabulary of {len(vocabulary)} tokens, and a new token would need "
        f"a new embedding.{nearest(token, marks) or nearest(token, vocabulary)} {listed}".rstrip()
    )


def _tokens_beyond(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> dict[str, int]:
    """The tokens whose id has no embedding, with their ids."""
    if len(tokenizer) <= embeddings:
        return {}
    return {token: i for token, i in tokenizer.get_vocab().items() if i >= embeddings}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Refuse a tokenizer with tokens beyond the model's number of embeddings.

    Raises:
        RecipeError: there are such tokens; it names the first five.
    """
    if beyond := _tokens_beyond(tokenizer, embeddings):
        shown = ", ".join(f"{token!r} (id {i})" for token, i in sorted(beyond.items(), key=lambda item: item[1])[:5])
        raise RecipeError(
            f"the tokenizer knows {len(beyond)} tokens beyond the model's {embeddings} embeddings: {shown}. The "
            "vocabulary never grows silently. Use the model's own tokenizer, take them out of its tokenizer.json, or "
            "resize the checkpoint beforehand."
        )
