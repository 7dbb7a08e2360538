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

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np

from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.base.values import check_choice
from matrix_llm.data.chat import ChatLayout, RefusedError, Segment, prompt_text
from matrix_llm.data.forms import Row, rows_from_columns
from matrix_llm.data.prompts import CHAT, TRAIN_ON, format_prompt, resolve_template

IGNORED = -100  # the label of positions that no loss counts
IDS = datasets.List(datasets.Value("int32"))  # half of int64: MetaMathQA's 395,000 rows are 100 million ids, twice
FEATURES = {"input_ids": IDS, "labels": IDS, "row_id": datasets.Value("int32")}
MEASURES = {"length": datasets.Value("int32"), "trained": datasets.Value("int32"), "notes": datasets.Value("int8")}
# Bits of `notes`, for the report
LEFT_OUT, HAD_START, HAD_END = 1, 2, 4

TokenIds = list[int]


@dataclass
class Encoded:
    """One row as tokens."""

    ids: TokenIds
    """Its tokens."""
    labels: TokenIds
    """The same tokens, or IGNORED where nothing is trained."""
    has_start: bool = False
    """Its text began with <s>, which the tokenizer writes as well; one is kept."""
    has_end: bool = False
    """Its text ended in the end-of-text token, which follows every row; one is kept."""


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
    if prompt_template == CHAT:
        raise RecipeError(
            f"prompt_template={CHAT!r} is the tokenizer's chat template, which a tokenizer that is trained on the rows "
            "(tokenizer_vocab_size) does not have yet. Give tokenizer_name_or_path."
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
    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Encoded]:
        """Ids and labels of each row; the row ids are for error messages."""


class PairEncoder:
    """A prompt, which is not trained, and an answer, which is, followed by one end-of-text token."""

    def __init__(self, tokenizer: Any, prompt_template: str, separator: str, train_prompt: bool) -> None:
        self.tokenizer, self.prompt_template, self.separator = tokenizer, prompt_template, separator
        self.train_prompt = train_prompt
        self.continuation = Continuation(tokenizer)
        self.edges = Edges(tokenizer)

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Encoded]:
        for row, row_id in zip(rows, row_ids, strict=True):
            if row.messages or row.tools or row.template_kwargs:
                raise DataError(
                    f"row {row_id + 1} has a system prompt, earlier turns or tools, which "
                    f"prompt_template={self.prompt_template!r} has no place for. Set prompt_template: chat, or remove "
                    "the column."
                )
        texts = [row_texts(row, self.prompt_template, self.separator) for row in rows]
        prompts = self.edges.prompts([prompt for prompt, _ in texts])
        stops = [_without_end(answer, {self.tokenizer.eos_token}) for _, answer in texts]
        answers = self.continuation([text for text, _ in stops])
        return [
            Encoded(
                [*prompt, *answer, self.edges.eos],
                [*(prompt if self.train_prompt else [IGNORED] * len(prompt)), *answer, self.edges.eos],
                has_start=has_start,
                has_end=has_end,
            )
            for (prompt, has_start), answer, (_, has_end) in zip(prompts, answers, stops, strict=True)
        ]


class TextEncoder:
    """A text, trained from its first token to the end-of-text token."""

    def __init__(self, tokenizer: Any) -> None:
        self.edges = Edges(tokenizer)

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Encoded]:
        stops = [_without_end(row.answer, {self.edges.tokenizer.eos_token}) for row in rows]
        texts = self.edges.prompts([text for text, _ in stops])
        return [
            Encoded([*ids, self.edges.eos], [*ids, self.edges.eos], has_start=has_start, has_end=has_end)
            for (ids, has_start), (_, has_end) in zip(texts, stops, strict=True)
        ]


class ChatEncoder:
    """A conversation, laid out by chat.py; the assistant's turns are trained, each to its end-of-turn token.

    A question with its answer is a conversation too, with `prompt_template: chat`: its prompt has exactly the ids that
    evaluation starts from (`--prompt chat_question`).
    """

    def __init__(self, tokenizer: Any, train_on: str, *, is_exact: bool = False) -> None:
        self.tokenizer = tokenizer
        self.chat = ChatLayout(tokenizer, train_on, is_exact=is_exact)
        self.edges = Edges(tokenizer)
        self.continuation = Continuation(tokenizer)

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Encoded]:
        # 1. The text of each row in parts; each part is tokenised alone, so that a turn starts at a token boundary
        parts = [self._segments(row, row_id) for row, row_id in zip(rows, row_ids, strict=True)]
        first = self._tokenise([segments[0].text for segments, _ in parts])
        others = iter(self.continuation([segment.text for segments, _ in parts for segment in segments[1:]]))
        # 2. Put together
        for (segments, row), ids in zip(parts, first, strict=True):
            for segment, tokens in zip(segments, [ids, *(next(others) for _ in segments[1:])], strict=True):
                row.ids.extend(tokens)
                row.labels.extend(tokens if segment.is_trained else [IGNORED] * len(tokens))
        return [row for _, row in parts]

    def _segments(self, row: Row, row_id: int) -> tuple[list[Segment], Encoded]:
        """The parts of a row, and the row without its tokens."""
        messages = list(row.messages or [])
        if row.layout == "template":
            messages += [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}]
        # What the template writes around the turns is not written twice
        has_start = has_end = False
        if self.chat.writes_start:
            content, has_start = self.edges.without_start(messages[0]["content"])
            messages[0] = {**messages[0], "content": content}
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                content, is_ended = _without_end(message["content"], self.chat.ends)
                messages[i], has_end = {**message, "content": content}, has_end or is_ended
        try:
            segments = self.chat.segments(messages, row.tools, row.trained, row.template_kwargs)
        except RefusedError as reason:
            raise DataError(f"row {row_id + 1}: {reason}. Correct the row, or give chat_template_path.") from None
        return segments, Encoded([], [], has_start, has_end)

    def _tokenise(self, texts: list[str]) -> list[TokenIds]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


class Edges:
    """The special tokens around a row: written once, although its text or the tokenizer writes them as well."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id
        ids = tokenizer("a")["input_ids"]
        self.appends_eos = ids[-1:] == [self.eos]
        self.adds_bos = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]

    def without_start(self, text: str) -> tuple[str, bool]:
        """The text without the <s> that is written anyway, and whether it had one."""
        bos = self.tokenizer.bos_token
        if bos is None or not text.lstrip().startswith(bos):
            return text, False
        while text.lstrip().startswith(bos):
            text = text.lstrip().removeprefix(bos)
        return text, True

    def prompts(self, texts: Sequence[str]) -> list[tuple[TokenIds, bool]]:
        """Ids that begin as the tokenizer begins a text, and do not end; and whether the text began with <s> itself."""
        if not texts:
            return []
        starts = [self.without_start(text) if self.adds_bos else (text, False) for text in texts]
        ids = self.tokenizer([text for text, _ in starts])["input_ids"]
        if self.appends_eos:  # in the middle of a row it would mean that the text ends before the answer
            ids = [each[:-1] if each[-1:] == [self.eos] else each for each in ids]
        return [(each, has_start) for each, (_, has_start) in zip(ids, starts, strict=True)]


def _without_end(text: str, ends: Collection[str]) -> tuple[str, bool]:
    r"""The text without the end token that follows anyway, and whether it had one.

    >>> _without_end("2</s> ", {"</s>"})
    ('2', True)
    """
    stripped, whole = text.rstrip(), text
    while end := next((end for end in ends if stripped.endswith(end)), None):
        text = stripped.removesuffix(end)
        stripped = text.rstrip()
    return text, text != whole


def chat_prompt_ids(tokenizer: Any, question: str) -> TokenIds:
    """What a model answers a question from, with `prompt_template: chat`; training and inference have the same ids."""
    return tokenizer(prompt_text(tokenizer, question), add_special_tokens=False)["input_ids"]


# --- all rows of a source ---------------------------------------------------------------------------------------------


class Encoder:
    """Turns the rows of one source into ids and labels of at most max_length.

    Args:
        layout: the layout of the first row, as in Row.layout; rows of another one are encoded in their own.
        prompt_template: for questions with answers: a key of PROMPT_TEMPLATES, a text, or "chat".
        train_on: which of the assistant's turns are trained: "all", or the "last" of each conversation.
        train_prompt: whether the prompt of a row is trained as well (completion_only_loss: false).
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
        train_on: str = "all",
        train_prompt: bool = False,
        max_length: int | None = None,
        too_long: str = "drop",
    ) -> None:
        check_choice("too_long", too_long, ["drop", "truncate", "error"])
        check_choice("train_on", train_on, TRAIN_ON)
        resolve_template(prompt_template)
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token, so a model could not learn where to stop. "
                "Set eos_token in its tokenizer_config.json."
            )
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        self.prompt_template, self.response_separator = prompt_template, response_separator
        self.train_on, self.train_prompt = train_on, train_prompt
        self.layouts: dict[str, LayoutEncoder] = {}
        self._layout(layout)  # refuses what the tokenizer cannot lay out, before a row is read

    @property
    def settings(self) -> tuple[Any, ...]:
        """Everything that decides the tokens, apart from the rows and the tokenizer's own files."""
        template = resolve_template(self.prompt_template)
        return (
            template, self.response_separator, self.train_on, self.train_prompt, self.max_length, self.too_long
        )  # fmt: skip

    def _layout(self, layout: str) -> LayoutEncoder:
        """The encoder of a layout, made when the first row asks for it."""
        if layout not in self.layouts:
            self.layouts[layout] = self._make_layout(layout)
        return self.layouts[layout]

    def _make_layout(self, layout: str) -> LayoutEncoder:
        is_chat = layout == "chat" or (layout == "template" and self.prompt_template == CHAT)
        if self.train_prompt and is_chat:
            raise DataError(
                "completion_only_loss=False would train prompts, but of conversations only the assistant's turns are "
                "trained. Remove completion_only_loss, or give rows with prompt and completion as texts."
            )
        if self.train_on == "last" and layout == "text":
            raise DataError("train_on='last', but rows with `text` have no turns. Remove train_on, or give messages.")
        if is_chat:
            return ChatEncoder(self.tokenizer, self.train_on, is_exact=layout == "template")
        if layout == "text":
            return TextEncoder(self.tokenizer)
        template = "plain" if self.prompt_template == CHAT else self.prompt_template  # prompts are used as they are
        return PairEncoder(self.tokenizer, template, self.response_separator, self.train_prompt)

    def encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> dict[str, list]:
        """The columns of FEATURES and MEASURES: `length` in tokens before any cut, `trained` labels after it."""
        out: dict[str, list] = {name: [] for name in (*FEATURES, *MEASURES)}
        out["row_id"] = list(row_ids)
        for row, encoded in zip(rows, self._encode(rows, row_ids), strict=True):
            ids, labels = encoded.ids, encoded.labels
            length = len(ids)
            if self.max_length is not None and length > self.max_length:
                cut = self.max_length if self.too_long == "truncate" else 0
                ids, labels = ids[:cut], labels[:cut]
            out["input_ids"].append(ids)
            out["labels"].append(labels)
            out["length"].append(length)
            out["trained"].append(len(labels[1:]) - labels[1:].count(IGNORED))
            left_out = 0 if row.weight else LEFT_OUT
            out["notes"].append(left_out | HAD_START * encoded.has_start | HAD_END * encoded.has_end)
        return out

    def _encode(self, rows: Sequence[Row], row_ids: Sequence[int]) -> list[Encoded]:
        """Each row by the encoder of its layout; a row of weight 0 has no tokens."""
        found = [Encoded([], []) for _ in rows]
        for layout in dict.fromkeys(row.layout for row in rows):
            places = [place for place, row in enumerate(rows) if row.layout == layout and row.weight]
            if places:
                encoded = self._layout(layout).encode([rows[i] for i in places], [row_ids[i] for i in places])
                for place, each in zip(places, encoded, strict=True):
                    found[place] = each
        return found

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
