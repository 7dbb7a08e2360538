"""From checked rows to token ids and labels. Nothing is dropped here; that is done in selection.py.

    Row(question="1 + 1?", answer="The answer is: 2"), prompt_template "plain"
        -> input_ids  [<s>, "Question", ":", " 1", ..., "Answer", ":",  " The", " answer", " is", ":", " ", "2", </s>]
           labels     [-100, -100, ....................., -100, -100,  " The", " answer", " is", ":", " ", "2", </s>]

    Row(layout="text", answer="Two is even.")
        -> input_ids  [<s>, "Two", " is", " even", ".", </s>]
           labels     [<s>, "Two", " is", " even", ".", </s>]

    Row(layout="chat", messages=[{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}])
        -> input_ids  [<s>, "user", ":", "1", " +", " 1", "?", "assistant", ":",  "2", </s>]   as the chat template says
           labels     [-100, -100, ....................., -100, -100,             "2", </s>]

Labels are not shifted: labels[i] is input_ids[i], or -100 where nothing is trained, and position i - 1 predicts it. So
the first label of a row is never predicted, and "trained" below counts labels[1:] only.

The prompt and the answer are tokenised separately, so their boundary is a token boundary, and inference starts from
exactly the prompt ids of training.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from jinja2 import TemplateError

from matrix_llm.base.errors import DataError
from matrix_llm.base.values import check_choice
from matrix_llm.data.forms import Row, rows_from_columns
from matrix_llm.data.prompts import format_prompt, resolve_template

IGNORED = -100  # the label of positions that no loss counts
IDS = datasets.List(datasets.Value("int32"))  # half of int64: MetaMathQA's 395,000 rows are 100 million ids, twice
FEATURES = {"input_ids": IDS, "labels": IDS, "row_id": datasets.Value("int32")}
MEASURES = {"length": datasets.Value("int32"), "trained": datasets.Value("int32")}

TokenIds = list[int]
Labelled = tuple[TokenIds, TokenIds]  # ids and labels of one row, of the same length


def row_texts(row: Row, prompt_template: str = "metamath", separator: str = " ") -> tuple[str, str]:
    """(prompt, continuation): the two texts of a row that are tokenised; the prompt is what inference starts from.

    Args:
        separator: goes between a template's prompt and the answer, unless there is white space already.

    >>> row_texts(Row(question="1 + 1?", answer="2"), "plain")
    ('Question: 1 + 1?\\nAnswer:', ' 2')
    """
    if row.layout == "text":
        return "", row.answer
    if row.layout == "verbatim":
        return row.question, row.answer
    if row.layout == "chat":
        raise DataError(
            "rows with `messages` are laid out by the tokenizer's chat template, so they cannot train a tokenizer "
            "(tokenizer_vocab_size). Give tokenizer_name_or_path."
        )
    prompt = format_prompt(prompt_template, row.question)
    is_spaced = prompt[-1:].isspace() or row.answer[:1].isspace()
    return prompt, row.answer if is_spaced else separator + row.answer


# --- a text that follows another --------------------------------------------------------------------------------------


class Continuation:
    """Tokenises text that follows other text, so that decoding the two together gives exactly their concatenation.

    Encoding " 2" alone is right for byte-level BPE. Llama-style tokenizers put an extra space in front of a text
    ("▁▁2", two spaces). For them, " 2" is encoded as "2", and "2" is encoded after an anchor whose ids are then
    removed: a line break, or a control character where the line break merges with what follows. Which way works is
    found by trying, once per tokenizer.
    """

    ANCHORS = ("\n", "\x01")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.anchors = {text: self._encode([text])[0] for text in self.ANCHORS}
        self.encode_spaced = self._choose(" b", [self._encode, self._encode_without_space, self._encode_anchored])
        self.encode_unspaced = self._choose("b", [self._encode, self._encode_anchored])

    def __call__(self, texts: Sequence[str]) -> list[TokenIds]:
        is_spaced = [text.startswith(" ") and not text.startswith("  ") for text in texts]
        spaced = iter(self.encode_spaced([text for text, yes in zip(texts, is_spaced, strict=True) if yes]))
        unspaced = iter(self.encode_unspaced([text for text, yes in zip(texts, is_spaced, strict=True) if not yes]))
        return [next(spaced) if yes else next(unspaced) for yes in is_spaced]

    def _choose(self, text: str, ways: list[Callable[[list[str]], list[TokenIds]]]) -> Callable:
        before = self._encode(["A:"])[0]
        for way in ways:
            decoded = self.tokenizer.decode(before + way([text])[0], clean_up_tokenization_spaces=False)
            if decoded.endswith("A:" + text):
                return way
        return self._encode  # a word-level tokenizer, which loses spaces anyway

    def _encode(self, texts: list[str]) -> list[TokenIds]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _encode_without_space(self, texts: list[str]) -> list[TokenIds]:
        return self._encode([text[1:] for text in texts])

    def _encode_anchored(self, texts: list[str]) -> list[TokenIds]:
        result = self._encode(texts)  # for texts that merge with both anchors
        remaining = list(range(len(texts)))
        for anchor, anchor_ids in self.anchors.items():
            encoded = self._encode([anchor + texts[i] for i in remaining])
            merged = []
            for i, ids in zip(remaining, encoded, strict=True):
                if ids[: len(anchor_ids)] == anchor_ids:
                    result[i] = ids[len(anchor_ids) :]
                else:
                    merged.append(i)
            remaining = merged
        return result


# --- one encoder for each layout --------------------------------------------------------------------------------------


class LayoutEncoder(Protocol):
    @property
    def settings(self) -> tuple[Any, ...]:
        """Everything that decides the ids, apart from the rows and the tokenizer's own files."""

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Labelled]:
        """Ids and labels of each row; the row ids are for error messages."""


class PairEncoder:
    """A prompt, which is not trained, and an answer, which is, followed by one end-of-text token."""

    def __init__(self, tokenizer: Any, prompt_template: str, separator: str) -> None:
        self.tokenizer, self.prompt_template, self.separator = tokenizer, prompt_template, separator
        self.settings = ("pair", resolve_template(prompt_template), separator)
        self.continuation = Continuation(tokenizer)
        self.appends_eos = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Labelled]:
        texts = [row_texts(row, self.prompt_template, self.separator) for row in rows]
        prompts = self.tokenizer([prompt for prompt, _ in texts])["input_ids"]
        if self.appends_eos:  # in the middle of a row it would mean that the text ends before the answer
            prompts = [_without_end(ids, self.tokenizer.eos_token_id) for ids in prompts]
        answers = self.continuation([answer for _, answer in texts])
        answers = [_with_end(ids, self.tokenizer.eos_token_id) for ids in answers]
        return [
            (prompt + answer, [IGNORED] * len(prompt) + answer) for prompt, answer in zip(prompts, answers, strict=True)
        ]


class TextEncoder:
    """A text, trained from its first token to the end-of-text token."""

    settings = ("text",)

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Labelled]:
        texts = self.tokenizer([row.answer for row in rows])["input_ids"]
        texts = [_with_end(ids, self.tokenizer.eos_token_id) for ids in texts]
        return [(ids, list(ids)) for ids in texts]


class ChatEncoder:
    """A conversation. What the chat template marks with {% generation %}, the assistant's turns, is trained."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat_template = _training_chat_template(tokenizer)
        self.settings = ("chat", self.chat_template)

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Labelled]:
        return [self._encode_one(row, row_id) for row, row_id in zip(rows, row_ids, strict=True)]

    def _encode_one(self, row: Row, row_id: int) -> Labelled:
        try:
            out = self.tokenizer.apply_chat_template(
                row.messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                chat_template=self.chat_template,
            )
        except TemplateError as error:  # raised by the template itself: "roles must alternate"
            raise DataError(
                f"row {row_id + 1}: the tokenizer's chat template refuses the messages: {error} "
                "Correct the row, or give chat_template_path."
            ) from None
        ids, mask = out["input_ids"], out["assistant_masks"]
        return ids, [token if is_trained else IGNORED for token, is_trained in zip(ids, mask, strict=True)]


def _training_chat_template(tokenizer: Any) -> str | None:
    """TRL's patched chat template that marks the assistant's tokens, or None if the tokenizer's own marks them."""
    if not tokenizer.chat_template:
        raise DataError(
            "the rows have `messages`, but the tokenizer has no chat template to lay them out. "
            "Give chat_template_path, or rows with prompt and completion."
        )
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers  # loads torch

    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise DataError(
            "the chat template of the tokenizer does not mark the assistant's turns, and TRL has no patched one. "
            "Put {% generation %} and {% endgeneration %} around the assistant's content (chat_template_path). "
            f"TRL says: {error}"
        ) from None


def _with_end(ids: TokenIds, eos: int) -> TokenIds:
    return ids if ids[-1:] == [eos] else [*ids, eos]


def _without_end(ids: TokenIds, eos: int) -> TokenIds:
    return ids[:-1] if ids[-1:] == [eos] else ids


# --- all rows of a source ---------------------------------------------------------------------------------------------


class Encoder:
    """Turns the rows of one source, which all have the same layout, into ids and labels of at most max_length.

    Args:
        layout: the layout of the rows, as in Row.layout.
        max_length: in tokens; None means no limit.
        too_long: what happens to longer rows: "truncate" cuts their end; "drop" and "error" empty them here, and
            selection.py then drops or refuses them.

    Raises:
        DataError: the tokenizer cannot lay out such rows.
    """

    def __init__(
        self,
        tokenizer: Any,
        layout: str = "template",
        *,
        prompt_template: str = "metamath",
        response_separator: str = " ",
        max_length: int | None = None,
        too_long: str = "drop",
    ) -> None:
        check_choice("too_long", too_long, ["drop", "truncate", "error"])
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token, so a model could not learn where to stop. "
                "Set eos_token in its tokenizer_config.json."
            )
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        self.layout: LayoutEncoder
        if layout == "chat":
            self.layout = ChatEncoder(tokenizer)
        elif layout == "text":
            self.layout = TextEncoder(tokenizer)
        else:
            self.layout = PairEncoder(tokenizer, prompt_template, response_separator)

    @property
    def settings(self) -> tuple[Any, ...]:
        """Everything that decides the tokens, apart from the rows and the tokenizer's own files."""
        return (*self.layout.settings, self.max_length, self.too_long)

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> dict[str, list]:
        """The columns of FEATURES and MEASURES: `length` in tokens before any cut, `trained` labels after it."""
        out: dict[str, list] = {"input_ids": [], "labels": [], "row_id": list(row_ids), "length": [], "trained": []}
        for ids, labels in self.layout.encode(rows, row_ids):
            length = len(ids)
            if self.max_length is not None and length > self.max_length:
                cut = self.max_length if self.too_long == "truncate" else 0
                ids, labels = ids[:cut], labels[:cut]
            out["input_ids"].append(ids)
            out["labels"].append(labels)
            out["length"].append(length)
            out["trained"].append(len(labels[1:]) - labels[1:].count(IGNORED))
        return out

    def cut(self, lengths: np.ndarray) -> np.ndarray:
        """The lengths of rows that are kept, after the cut to max_length."""
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    def encode_columns(self, columns: dict[str, list], row_ids: list[int]) -> dict[str, list]:
        """`encode` for Dataset.map, which passes a batch of rows as columns named after the fields of `Row`."""
        return self.encode(rows_from_columns(columns), row_ids)


def tokenise(
    table: datasets.Dataset,
    encoder: Encoder,
    *,
    name: str = "train",
    num_proc: int | None = None,
    file: Path | None = None,
) -> datasets.Dataset:
    """The tokens of every row, including those that will be dropped.

    Args:
        table: has the fields of Row as columns, in the same order.
        name: for the progress bar.
        num_proc: processes to tokenise with.
        file: the Arrow file to write and memory-map (with num_proc, one per process, named after it); None: in memory.
    """
    return table.map(
        encoder.encode_columns,
        batched=True,
        with_indices=True,
        remove_columns=table.column_names,
        features=datasets.Features(FEATURES | MEASURES),
        num_proc=num_proc,
        cache_file_name=str(file) if file else None,
        load_from_cache_file=False,  # cache.py decides what is still valid, by its own key
        new_fingerprint="0" * 16,  # otherwise `datasets` slowly hashes the tokenizer for a name that nothing reads
        desc=f"Tokenising {name}",
    )
