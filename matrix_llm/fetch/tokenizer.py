"""The tokenizer of a GGUF file, made to split text as the model's own does.

transformers builds it from the file's vocabulary and merges. Two things it leaves out, in silence, and the model then
reads ids that it was not trained on:

- `tokenizer.ggml.pre` names how text is split before merges apply. transformers knows some of the names, and takes
  GPT-2's split for all others: "a  12" then becomes "a" " " " " "1" "2" where SmolLM2 has "a" "  " "1" "2".
- `tokenizer.ggml.add_bos_token`: Gemma and Llama read every text after <bos>.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from matrix_llm.base.errors import FetchError, one_line
from matrix_llm.fetch.header import Header

BYTE_LEVEL = "gpt2"  # a value of tokenizer.ggml.model: the only kind whose split `pre` decides
# The names in `tokenizer.ggml.pre`, as llama.cpp gives them: these split as GPT-2 does,
GPT2_SPLIT = {"gpt-2", "phi-2", "olmo", "jais", "mpt", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"}
# and these the same after each digit has been set apart
DIGITS_AND_GPT2_SPLIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# keys of a saved tokenizer that say where this one was loaded from
LOADING = ("name_or_path", "is_local", "local_files_only", "vocab_file")


def load_gguf_tokenizer(folder: Path, name: str, header: Header, longest: int | None) -> PreTrainedTokenizerBase:
    """The tokenizer of `folder/name`.

    Args:
        longest: the longest text that the model reads, in tokens.

    Raises:
        FetchError: transformers cannot build it, or would split text in another way than the model's own.
    """
    # 1. what transformers makes of it
    pre = header.metadata.get("tokenizer.ggml.pre")
    _check_split(header, pre)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=name)
    except Exception as error:  # whatever an untrusted file leads the library into
        raise FetchError(
            f"the tokenizer of the .gguf file cannot be built: {one_line(error)}. Fetch the model's own files instead."
        ) from None

    # 2. what it leaves out
    if _is_byte_level(header) and pre in DIGITS_AND_GPT2_SPLIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    _frame(tokenizer, header)

    # 3. what it brings from loading
    for key in LOADING:
        tokenizer.init_kwargs.pop(key, None)
    if longest is not None:
        tokenizer.model_max_length = longest
    return tokenizer


def _is_byte_level(header: Header) -> bool:
    return header.metadata.get("tokenizer.ggml.model") == BYTE_LEVEL


def _check_split(header: Header, pre: Any) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    known = {*GPT2_SPLIT, *DIGITS_AND_GPT2_SPLIT, *GGUF_PRE_TOKENIZER_SPLITS}
    if _is_byte_level(header) and pre not in known:
        said = "is not set" if pre is None else f"is {pre!r}, which neither transformers nor this command knows"
        raise FetchError(
            f"the file's tokenizer.ggml.pre {said}: text would be split into other tokens than the model was trained "
            "on. Fetch the model's own files (user/name on the Hub) instead."
        )


def _frame(tokenizer: PreTrainedTokenizerBase, header: Header) -> None:
    """Put the begin and end tokens around a text, or leave them out, as the file says; silent files change nothing."""
    wanted = [header.metadata.get(f"tokenizer.ggml.add_{name}_token") for name in ("bos", "eos")]
    if wanted == [None, None]:
        return
    marks = [(tokenizer.bos_token, tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)]
    bos, eos = ([mark] if is_put and mark[1] is not None else [] for is_put, mark in zip(wanted, marks, strict=True))
    single = [*(token for token, _ in bos), "$A", *(token for token, _ in eos)]
    second = [f"{part.replace('$A', '$B')}:1" for part in single]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(single), pair=" ".join(single + second), special_tokens=[*bos, *eos]
    )
