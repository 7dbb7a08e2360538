"""From checked rows to token ids and labels. Rows that are too long are counted.

    {"query": "1 + 1?", "response": "The answer is: 2"}
        -> input_ids  [<s>, Question, :, ..., Answer, :, " The", " answer", " is", ":", " ", "2", </s>]
           labels     [-100, ...................., -100, " The", " answer", " is", ":", " ", "2", </s>]
           row_id     0

The prompt and the response are tokenised apart, so their boundary is a token boundary and inference sees the very prompt ids of training.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from matrix_llm.base.errors import DataError
from matrix_llm.data.prompts import format_prompt
from matrix_llm.data.readers import FORMS, Source, detect_form, load_rows, local_path, looks_local

__all__ = [
    "IGNORED", "DataError", "DataReport", "Encoder", "Source", "build_dataset", "gsm8k_response", "load_rows", "local_path",
    "looks_local", "row_texts",
]  # fmt: skip

IGNORED = -100  # a label that no loss counts
IDS = datasets.List(
    datasets.Value("int32")
)  # half the bytes of Python's integers; 395,000 rows are 160 million ids and labels
FEATURES = {"input_ids": IDS, "labels": IDS, "row_id": datasets.Value("int32")}
MEASURES = {"length": datasets.Value("int32"), "trained": datasets.Value("int32")}


@dataclass
class DataReport:
    """What became of the rows; printed before training so that nothing is cut in silence."""

    name: str
    rows_in: int
    rows_kept: int
    dropped_too_long: int
    truncated: int
    dropped_all_masked: int
    tokens: int
    trained_tokens: int
    longest: int  # tokens of the longest row, before anything was cut
    mean_length: float  # of the rows kept
    mean_read: float = 0.0  # of all rows, before anything was cut, as are the percentiles
    p50: int = 0
    p90: int = 0
    p99: int = 0
    dropped_leaked: int = 0
    sampled: bool = False  # streaming: these are the first rows only

    def lines(self) -> list[str]:
        of = f"of the first {self.rows_in:,} rows of the stream" if self.sampled else f"of {self.rows_in:,} rows kept"
        kept = f"{self.name}: {self.rows_kept:,} {of}, {self.tokens:,} tokens, {self.trained_tokens:,} trained"
        size = (
            f"{self.name}: tokens a row, before any cut: mean {self.mean_read:.1f}, p50 {self.p50:,}, p90 {self.p90:,}, p99 {self.p99:,}, "
            f"longest {self.longest:,}; mean of the rows kept {self.mean_length:.1f}"
        )
        lost = [
            f"{self.name}: {count:,} rows {what} ({100 * count / max(self.rows_in, 1):.2f} %)"
            for count, what in [
                (self.dropped_too_long, "dropped, longer than max_length"),
                (self.truncated, "cut to max_length"),
                (self.dropped_all_masked, "dropped, no trained token left"),
                (self.dropped_leaked, "dropped, found among the questions of leakage_check"),
            ]
            if count
        ]
        return [kept, size, *lost]


# ------------------------------------------------------------------------------------------------------------- rows to tokens


def gsm8k_response(answer: str) -> str:
    """GSM8K's answer as a response: calculator annotations go, and the last line reads as in MetaMathQA.

    >>> gsm8k_response("48/2 = <<48/2=24>>24 clips.\\n#### 24")
    '48/2 = 24 clips.\\nThe answer is: 24'
    """
    if not re.search(r"^#### ", answer, flags=re.MULTILINE):
        return answer
    return re.sub(r"^#### ", "The answer is: ", re.sub(r"<<[^<>]*>>", "", answer), flags=re.MULTILINE)


def row_texts(row: dict[str, Any], prompt_template: str = "metamath", separator: str = " ") -> tuple[str, str]:
    """(prompt, continuation): the two texts that are tokenised; the prompt is what inference starts from.

    `separator` comes between a question's prompt and its response, unless white space stands there already.

    >>> row_texts({"query": "1 + 1?", "response": "2"}, "plain")
    ('Question: 1 + 1?\\nAnswer:', ' 2')
    """
    form = detect_form(row, "the row")
    if form == "text":
        return "", row["text"]
    if form == "messages":
        raise DataError("rows in messages form are laid out by the tokenizer's chat template, not by prompt_template.")
    question, answer = (row[name] for name in FORMS[form])
    if form == "prompt/completion":
        return question, answer
    if form == "question/answer":
        answer = gsm8k_response(answer)
    prompt = format_prompt(prompt_template, question)
    return prompt, answer if prompt[-1:].isspace() or answer[:1].isspace() else separator + answer


class Continuation:
    """Tokenises a text that follows another, so that decoding the two together gives back exactly their concatenation.

    Encoding " 2" alone is right for byte-level BPE. Llama-style tokenizers put a space of their own in front ("▁▁2", two spaces):
    there " 2" is encoded as "2", and "2" behind a character that is then taken off: a line break, or a control character where the
    line break merges with what follows. Which way applies is found by trying, once per tokenizer.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.anchors = {text: self._encode([text])[0] for text in ("\n", "\x01")}
        self.after_space = self._choose(" b", [self._direct, self._without_space, self._anchored])
        self.verbatim = self._choose("b", [self._direct, self._anchored])

    def __call__(self, texts: list[str]) -> list[list[int]]:
        spaced = [text.startswith(" ") and not text.startswith("  ") for text in texts]
        after_space = iter(self.after_space([text for text, yes in zip(texts, spaced, strict=True) if yes]))
        verbatim = iter(self.verbatim([text for text, yes in zip(texts, spaced, strict=True) if not yes]))
        return [next(after_space) if yes else next(verbatim) for yes in spaced]

    def _choose(self, text: str, ways):
        head = self._encode(["A:"])[0]
        for way in ways:
            if self.tokenizer.decode(head + way([text])[0], clean_up_tokenization_spaces=False).endswith("A:" + text):
                return way
        return self._direct  # a tokenizer that loses spaces on its own (word level): nothing to preserve

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _direct(self, texts: list[str]) -> list[list[int]]:
        return self._encode(texts)

    def _without_space(self, texts: list[str]) -> list[list[int]]:
        return self._encode([text[1:] for text in texts])

    def _anchored(self, texts: list[str]) -> list[list[int]]:
        result = self._encode(texts)
        left = list(range(len(texts)))
        for anchor, ids in self.anchors.items():
            behind = dict(zip(left, self._encode([anchor + texts[i] for i in left]), strict=True))
            clean = [i for i in left if behind[i][: len(ids)] == ids]
            for i in clean:
                result[i] = behind[i][len(ids) :]
            left = [i for i in left if i not in set(clean)]
        return result


def _encode_pairs(
    batch: dict[str, list], tokenizer, continuation: Continuation, prompt_template: str, separator: str, strip_eos: bool
):
    """Token ids and labels of prompt and response rows; the end-of-text token is trained, and added once."""
    eos = tokenizer.eos_token_id
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    pairs = [row_texts(row, prompt_template, separator) for row in rows]
    if "text" in batch:
        prompts: list[list[int]] = [[] for _ in pairs]
        answers = tokenizer([text for _, text in pairs])["input_ids"]
    else:
        prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        prompts = [ids[:-1] if strip_eos and ids[-1:] == [eos] else ids for ids in prompts]
        answers = continuation([answer for _, answer in pairs])
    answers = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in answers]
    for prompt, answer in zip(prompts, answers, strict=True):
        yield prompt + answer, [IGNORED] * len(prompt) + answer


def _encode_messages(batch: dict[str, list], tokenizer, chat_template: str | None):
    """Token ids of whole conversations, labels on what the assistant says, as the chat template's {% generation %} blocks mark it."""
    for messages, row_id in zip(batch["messages"], batch["row_id"], strict=True):
        try:
            out = tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                chat_template=chat_template,
            )
        except Exception as error:  # jinja: "roles must alternate", raised by the template itself
            raise DataError(f"row {row_id + 1}: the tokenizer's chat template refuses the messages: {error}") from None
        ids, mask = out["input_ids"], out["assistant_masks"]
        yield ids, [token if yes else IGNORED for token, yes in zip(ids, mask, strict=True)]


def _training_chat_template(tokenizer) -> str | None:
    """A chat template that marks the assistant's tokens: the tokenizer's own where it does, else TRL's patched one."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.chat_template:
        raise DataError(
            "the rows are in messages form, but the tokenizer has no chat template to lay them out. Give chat_template_path, or rows with "
            "prompt and completion."
        )
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise DataError(
            "the tokenizer's chat template does not mark what the assistant says, and TRL has no patched version of it. Put "
            f"{{% generation %}} and {{% endgeneration %}} around the assistant's content (chat_template_path). TRL says: {error}"
        ) from None


@dataclass
class Encoder:
    """How a row becomes token ids and labels: everything but the rows that decides what the tokens are.

    too_long: "drop" leaves rows longer than max_length empty, "truncate" cuts their end, "error" stops (see keep).
    """

    tokenizer: Any
    form: str  # a key of FORMS
    prompt_template: str = "metamath"
    response_separator: str = " "
    max_length: int | None = None
    too_long: str = "drop"
    _options: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.too_long not in ("drop", "truncate", "error"):
            raise ValueError(f"too_long={self.too_long!r} is not one of drop, truncate, error.")
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the tokenizer has no end-of-text token, so a model could not learn where to stop. Set tokenizer.eos_token."
            )
        self._options = {"tokenizer": self.tokenizer}
        if self.form == "messages":
            self._options["chat_template"] = _training_chat_template(self.tokenizer)
        else:
            self._options |= {
                "continuation": Continuation(self.tokenizer),
                "prompt_template": self.prompt_template,
                "separator": self.response_separator,
                "strip_eos": self.tokenizer("a")["input_ids"][-1:] == [eos],
            }

    def settings(self) -> tuple[Any, ...]:
        """What the tokens depend on besides the tokenizer and the rows."""
        template = (
            self._options.get("chat_template")
            if self.form == "messages"
            else format_prompt(self.prompt_template, "{instruction}")
        )
        return self.form, template, self.response_separator, self.max_length, self.too_long

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """Columns of FEATURES and MEASURES: `length` is in tokens before any cut, `trained` counts the labels that are predicted."""
        out: dict[str, list] = {"input_ids": [], "labels": [], "row_id": list(indices), "length": [], "trained": []}
        encode: Any = _encode_messages if self.form == "messages" else _encode_pairs
        for ids, labels in encode({**batch, "row_id": indices}, **self._options):
            length = len(ids)
            if self.max_length is not None and length > self.max_length:
                cut = self.max_length if self.too_long == "truncate" else 0
                ids, labels = ids[:cut], labels[:cut]
            out["input_ids"].append(ids)
            out["labels"].append(labels)
            out["length"].append(length)
            out["trained"].append(len(labels[1:]) - labels[1:].count(IGNORED))  # the first label is never predicted
        return out

    def over(self, length: int) -> bool:
        return self.max_length is not None and length > self.max_length


def build_dataset(
    rows: datasets.Dataset,
    tokenizer,
    *,
    prompt_template: str = "metamath",
    response_separator: str = " ",
    max_length: int | None = None,
    too_long: str = "drop",
    name: str = "train",
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """Rows of load_rows as input_ids, labels and row_id (the row's index in `rows`), and what became of them."""
    encoder = Encoder(
        tokenizer, detect_form(rows.column_names), prompt_template, response_separator, max_length, too_long
    )
    return keep(tokenise(rows, encoder, name=name, num_proc=num_proc), encoder, name)


def tokenise(
    rows: datasets.Dataset,
    encoder: Encoder,
    *,
    name: str = "train",
    num_proc: int | None = None,
    file: Path | None = None,
) -> datasets.Dataset:
    """Every row's tokens, those to be dropped included; in memory, or in `file` (with num_proc: in files beside it)."""
    columns = [*FORMS[encoder.form]]
    return rows.select_columns(columns).map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=columns,
        features=datasets.Features(FEATURES | MEASURES),
        num_proc=num_proc,
        cache_file_name=str(file) if file else None,
        load_from_cache_file=False,  # matrix_llm.data.cache decides what is still valid, by a key of its own
        new_fingerprint="0" * 16,  # datasets would hash the tokenizer, slowly, for a name that nothing reads
        desc=f"Tokenising {name}",
    )


def keep(
    done: datasets.Dataset, encoder: Encoder, name: str, leaked: Collection[int] = ()
) -> tuple[datasets.Dataset, DataReport]:
    """Leaves out the rows that cannot be trained on and those in `leaked`, and counts them.

    Raises:
        DataError: no row is left, or one is too long and too_long is "error".
    """
    lengths, trained = (done.data.column(column).to_numpy() for column in MEASURES)
    max_length, too_long = encoder.max_length, encoder.too_long
    over = lengths > max_length if max_length is not None else np.zeros(len(lengths), dtype=bool)
    if over.any() and too_long == "error":
        first = int(over.argmax())
        raise DataError(
            f"{name}: row {first + 1} is {lengths[first]} tokens long, over max_length={max_length}, as are {over.sum()} rows in all. "
            "Raise max_length, or set too_long to drop or truncate."
        )
    found = np.zeros(len(lengths), dtype=bool)
    found[list(leaked)] = True
    dropped = over & ~found if too_long == "drop" else np.zeros(len(lengths), dtype=bool)
    masked = (trained == 0) & ~dropped & ~found
    kept = np.flatnonzero(~(dropped | masked | found))
    if not len(kept):
        why = (
            "longer than max_length"
            if dropped.all()
            else "longer than max_length, without a trained token, or dropped as leaked"
        )
        raise DataError(
            f"{name}: all {len(lengths)} rows are {why}, so nothing is left to train on: the longest has {max(lengths, default=0)} tokens, "
            f"max_length={max_length}. Raise max_length."
        )
    sizes = lengths[kept] if max_length is None else np.minimum(lengths[kept], max_length)
    report = DataReport(
        name=name,
        rows_in=len(lengths),
        rows_kept=len(kept),
        dropped_too_long=int(dropped.sum()),
        truncated=int((over & ~masked & ~found).sum()) if too_long == "truncate" else 0,
        dropped_all_masked=int(masked.sum()),
        tokens=int(sizes.sum(dtype=np.int64)),
        trained_tokens=int(trained[kept].sum(dtype=np.int64)),
        longest=int(lengths.max()),
        mean_length=float(sizes.mean()),
        mean_read=float(lengths.mean()),
        **{f"p{q}": int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99)},  # type: ignore[arg-type]
        dropped_leaked=len(leaked),
    )
    done = done.remove_columns([*MEASURES])
    return (done if len(kept) == len(lengths) else done.select(kept)), report
