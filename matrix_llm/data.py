"""From a file, a folder, a Hub id or the built-in generator to token ids and labels.

Bad rows stop with file and line; rows that are too long are counted.

    {"query": "1 + 1?", "response": "The answer is: 2"}
        -> input_ids  [<s>, Question, :, ..., Answer, :, " The", " answer", " is", ":", " ", "2", </s>]
           labels     [-100, ...................., -100, " The", " answer", " is", ":", " ", "2", </s>]
           row_id     0

The prompt and the response are tokenised apart, so their boundary is a token boundary and inference sees the very prompt ids of training.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from matrix_llm.prompts import format_prompt

IGNORED = -100  # a label that no loss counts
SUFFIXES = (".jsonl", ".json", ".parquet")
CHUNK = 10_000  # rows held as Python objects at a time
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")

# Row forms in order of precedence: the first whose fields the first row has is required of every row.
FORMS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "query/response": ("query", "response"),  # MetaMathQA
    "question/answer": ("question", "answer"),  # GSM8K
    "text": ("text",),
}


class DataError(ValueError):
    """A row or a file that cannot be trained on. The message says where it is, what was found, and the way out."""


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

    def lines(self) -> list[str]:
        kept = f"{self.name}: {self.rows_kept:,} of {self.rows_in:,} rows kept, {self.tokens:,} tokens, {self.trained_tokens:,} trained"
        size = f"{self.name}: mean length {self.mean_length:.1f} tokens, longest row read {self.longest:,}"
        lost = [
            f"{self.name}: {count:,} rows {what}"
            for count, what in [
                (self.dropped_too_long, "dropped, longer than max_length"),
                (self.truncated, "cut to max_length"),
                (self.dropped_all_masked, "dropped, no trained token left"),
            ]
            if count
        ]
        return [kept, size, *lost]


# ---------------------------------------------------------------------------------------------------------------- where rows are


def looks_local(source: str) -> bool:
    """True for what can only be meant as a path: data/x.jsonl, ./folder, /folder, ~/folder. "org/name" is a Hub id."""
    return source.endswith(SUFFIXES) or source.startswith(("./", "../", "/", "~"))


def local_path(source: str) -> Path | None:
    """The existing file or folder that `source` names, or None ("builtin" and Hub ids)."""
    path = Path(source).expanduser()
    return path if source != "builtin" and path.exists() else None


def _files_in(folder: Path, split: str) -> list[Path]:
    """The folder's files of one split: those named after it (train.jsonl, train-00000-of-00002.parquet), or all where none is named so."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and "/." not in f"/{p.relative_to(folder).as_posix()}")
    if not files:
        raise DataError(f"{folder.absolute()} holds no {', '.join(SUFFIXES)} file, so there are no rows to read. Give another path.")
    names = {path: re.split(r"[-_.]", path.stem)[0] for path in files}
    chosen = [path for path in files if names[path] == split]
    others = sorted({name for name in names.values() if name in SPLITS})
    if not chosen and others:
        raise DataError(
            f"{folder.absolute()} has files for {', '.join(others)}, but none for the split {split!r}. Name one of them, or give a file."
        )
    return chosen or files


# ------------------------------------------------------------------------------------------------------------------ reading rows


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """("file line 3", object) for each line; a line at a time, so that memory does not grow with the file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield where, json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8.") from None
            except json.JSONDecodeError as error:
                shown = text if len(text) <= 60 else text[:60] + "..."
                raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}): {shown}. Correct or remove the line.") from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON array of objects; a .json file that does not start with [ is read as JSON lines."""
    with path.open("rb") as file:
        if not file.read(1024).decode("utf-8-sig", errors="replace").lstrip().startswith("["):
            yield from _read_jsonl(path)
            return
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not JSON ({error.msg} at column {error.colno}). Correct the file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Save the file as UTF-8.") from None
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, start=1))


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=CHUNK):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from None


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


def _read_hub(source: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # offline, gated, no such split, no such configuration: the Hub client has a class for each
        named = f"{source!r}" + (f" (configuration {config!r})" if config else "")
        raise DataError(
            f"the dataset {named}, split {split!r}, is neither a local path nor readable from the Hub: {type(error).__name__}: {error} "
            "Check the name and the connection, or give a local file."
        ) from None
    yield from ((f"{source} row {number}", row) for number, row in enumerate(rows, start=1))


# --------------------------------------------------------------------------------------------------------------- checking rows


def _describe(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def detect_form(columns: Iterable[str], where: str = "the rows") -> str:
    """The row form of these columns.

    >>> detect_form(["query", "response", "type", "original_question"])
    'query/response'
    """
    columns = list(columns)
    for form, fields in FORMS.items():
        if all(name in columns for name in fields):
            return form
    half = [f"`{has}` but no `{lacks}`" for f in FORMS.values() if len(f) == 2 for has, lacks in (f, f[::-1]) if has in columns]
    found = f"has {half[0]}" if half else f"has the fields {', '.join(map(str, columns)) or '(none)'}"
    raise DataError(f"{where} {found}. A row needs one of: {'; '.join(' and '.join(fields) for fields in FORMS.values())}.")


def _check_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_describe(message)}, but a message is an object with `role` and `content`.")
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            raise DataError(f"{where} has `{name}` = {_describe(message.get(name))}, but it must be a text.")
    return {"role": message["role"], "content": message["content"]}


def _check_row(row: Any, form: str, where: str) -> dict[str, Any]:
    """The row's fields of this form, or DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with {' and '.join(FORMS[form])}, found {_describe(row)}.")
    for name in FORMS[form]:
        if name not in row:
            has = ", ".join(map(str, row)) or "nothing"
            raise DataError(f"{where}: no `{name}`; the row has {has}. Every row needs {' and '.join(FORMS[form])}.")
    if form == "messages":
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{where}: `messages` is {_describe(messages)}, but it must be a list of role and content.")
        checked = [_check_message(message, f"{where}: message {i}") for i, message in enumerate(messages, start=1)]
        if all(message["role"] != "assistant" for message in checked):
            raise DataError(f"{where}: no message has the role assistant, so there is nothing to train on.")
        return {"messages": checked}
    for name in FORMS[form]:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: `{name}` is {_describe(row[name])}, but it must be a text.")
        try:
            row[name].encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: `{name}` holds half of a surrogate pair, which is no text. Correct its escape sequences.") from None
        if not row[name].strip():
            raise DataError(f"{where}: `{name}` is empty. Fill it in, or remove the row.")
    return {name: row[name] for name in FORMS[form]}


def _to_dataset(rows: Iterator[tuple[str, Any]], max_rows: int | None, source: str) -> datasets.Dataset:
    """Checked rows as Arrow chunks, so that only CHUNK of them are Python objects at a time."""
    form = None
    tables = []
    rows = itertools.islice(rows, max_rows)
    while chunk := list(itertools.islice(rows, CHUNK)):
        if form is None:
            where, first = chunk[0]
            if not isinstance(first, dict):
                raise DataError(f"{where}: expected an object, found {_describe(first)}.")
            form = detect_form(first, f"{where}: the row")
        tables.append(pa.Table.from_pylist([_check_row(row, form, where) for where, row in chunk]))
    if not tables:
        raise DataError(f"{source} holds no rows, so there is nothing to read. Give a file with one JSON object a line.")
    return datasets.Dataset(pa.concat_tables(tables))


def load_rows(
    source: str,
    *,
    config: str | None = None,
    split: str = "train",
    max_rows: int | None = None,
    builtin_rows: int = 20_000,
    seed: int = 42,
) -> datasets.Dataset:
    """Raw rows, each checked: "builtin" (builtin_rows of them, of `split` "train" or "test"), a file, a folder, or a Hub id.

    The columns are those of the rows' form (see FORMS); "builtin" also has type, original_question and answer.
    """
    if source == "builtin":
        from matrix_llm import wordproblems

        count = builtin_rows if max_rows is None else min(builtin_rows, max_rows)
        problems = wordproblems.generate(count, seed=seed, split="train" if split == "train" else "test")
        columns = ("query", "response", "type", "original_question", "answer")
        return datasets.Dataset.from_list([{name: getattr(problem, name) for name in columns} for problem in problems])
    path = local_path(source)
    if path is None:
        if looks_local(source):
            raise DataError(f"{source}: nothing at {Path(source).expanduser().absolute()}. Correct the path.")
        return _to_dataset(_read_hub(source, config, split), max_rows, f"{source} (split {split})")
    files = _files_in(path, split) if path.is_dir() else [path]
    for file in files:
        if file.suffix not in SUFFIXES:
            raise DataError(f"{file.absolute()}: rows are read from {', '.join(SUFFIXES)} files. Convert or rename it.")
    rows = itertools.chain.from_iterable(_READERS[file.suffix](file) for file in files)
    return _to_dataset(rows, max_rows, str(path))


# ------------------------------------------------------------------------------------------------------------- rows to tokens


def gsm8k_response(answer: str) -> str:
    """GSM8K's answer as a response: calculator annotations go, and the last line reads as in MetaMathQA.

    >>> gsm8k_response("48/2 = <<48/2=24>>24 clips.\\n#### 24")
    '48/2 = 24 clips.\\nThe answer is: 24'
    """
    if not re.search(r"^#### ", answer, flags=re.MULTILINE):
        return answer
    return re.sub(r"^#### ", "The answer is: ", re.sub(r"<<[^<>]*>>", "", answer), flags=re.MULTILINE)


def row_texts(row: dict[str, Any], prompt_template: str = "metamath") -> tuple[str, str]:
    """(prompt, continuation): the two texts that are tokenised; the prompt is what inference starts from.

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
    return prompt, answer if prompt[-1:].isspace() or answer[:1].isspace() else " " + answer


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


def _encode_pairs(batch: dict[str, list], tokenizer, continuation: Continuation, prompt_template: str, strip_eos: bool):
    """Token ids and labels of prompt and response rows; the end-of-text token is trained, and added once."""
    eos = tokenizer.eos_token_id
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    pairs = [row_texts(row, prompt_template) for row in rows]
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
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=chat_template
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


def build_dataset(
    rows: datasets.Dataset,
    tokenizer,
    *,
    prompt_template: str = "metamath",
    max_length: int | None = None,
    too_long: str = "drop",
    name: str = "train",
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """Rows of load_rows as input_ids, labels and row_id (the row's index in `rows`), and what became of them.

    too_long: "drop" leaves out rows longer than max_length, "truncate" cuts their end, "error" stops at the first.
    """
    if too_long not in ("drop", "truncate", "error"):
        raise ValueError(f"too_long={too_long!r} is not one of drop, truncate, error.")
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token, so a model could not learn where to stop. Set tokenizer.eos_token.")
    form = detect_form(rows.column_names)
    if form == "messages":
        chat_template = _training_chat_template(tokenizer)
        options: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": chat_template}
        encode: Any = _encode_messages
    else:
        strip_eos = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
        continuation = Continuation(tokenizer)
        options = {"tokenizer": tokenizer, "continuation": continuation, "prompt_template": prompt_template, "strip_eos": strip_eos}
        encode = _encode_pairs

    def tokenise(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        out: dict[str, list] = {"input_ids": [], "labels": [], "row_id": indices, "length": [], "trained": []}
        for ids, labels in encode({**batch, "row_id": indices}, **options):
            length = len(ids)
            if max_length is not None and length > max_length:
                ids, labels = (ids[:max_length], labels[:max_length]) if too_long == "truncate" else ([], [])
            out["input_ids"].append(ids)
            out["labels"].append(labels)
            out["length"].append(length)
            out["trained"].append(sum(label != IGNORED for label in labels[1:]))  # the first label is never predicted
        return out

    columns = [*FORMS[form]]
    done = rows.select_columns(columns).map(
        tokenise,
        batched=True,
        with_indices=True,
        remove_columns=columns,
        num_proc=num_proc,
        load_from_cache_file=False,  # a tokenizer trained a moment ago may share its fingerprint with an older one
        desc=f"Tokenising {name}",
    )
    return _keep(done, max_length, too_long, name)


def _keep(done: datasets.Dataset, max_length: int | None, too_long: str, name: str) -> tuple[datasets.Dataset, DataReport]:
    """Leaves out the rows that cannot be trained on, and counts them."""
    lengths, trained = list(done["length"]), list(done["trained"])
    over = [i for i, length in enumerate(lengths) if max_length is not None and length > max_length]
    if over and too_long == "error":
        raise DataError(
            f"{name}: row {over[0] + 1} is {lengths[over[0]]} tokens long, over max_length={max_length}, as are {len(over)} rows in all. "
            "Raise max_length, or set too_long to drop or truncate."
        )
    dropped = set(over) if too_long == "drop" else set()
    masked = {i for i, count in enumerate(trained) if count == 0} - dropped
    kept = [i for i in range(len(lengths)) if i not in dropped and i not in masked]
    if not kept:
        why = "longer than max_length" if len(dropped) == len(lengths) else "longer than max_length or without a trained token"
        raise DataError(
            f"{name}: all {len(lengths)} rows are {why}, so nothing is left to train on: the longest has {max(lengths, default=0)} tokens, "
            f"max_length={max_length}. Raise max_length."
        )
    sizes = [lengths[i] if max_length is None else min(lengths[i], max_length) for i in kept]
    report = DataReport(
        name=name,
        rows_in=len(lengths),
        rows_kept=len(kept),
        dropped_too_long=len(dropped),
        truncated=len(set(over) - masked) if too_long == "truncate" else 0,
        dropped_all_masked=len(masked),
        tokens=sum(sizes),
        trained_tokens=sum(trained[i] for i in kept),
        longest=max(lengths),
        mean_length=sum(sizes) / len(kept),
    )
    done = done.remove_columns(["length", "trained"])
    return (done if len(kept) == len(lengths) else done.select(kept)), report
