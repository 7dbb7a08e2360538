"""From a recipe to tokenizer, training set and held-out set: cached or streamed, checked for test questions, measured.

Under `accelerate launch` each machine's first process reads, tokenises and writes the cache while the others wait; they then open it.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from matrix_llm.base.errors import DataError
from matrix_llm.base.files import write_text
from matrix_llm.config import DataArguments, Recipe
from matrix_llm.data.cache import cache_root, cached_folder, key_of, open_arrow, tokenizer_key
from matrix_llm.data.leakage import FIELDS, LeakageReport, QuestionIndex, find_leaks, question_of
from matrix_llm.data.readers import Source, detect_form
from matrix_llm.data.streaming import TokenStream
from matrix_llm.data.tokens import DataReport, Encoder, keep, row_texts, tokenise
from matrix_llm.model.tokenizer import load_tokenizer

LEAKAGE = "leakage.json"

Rows = datasets.Dataset | datasets.IterableDataset
Prepared = tuple[Any, tuple[Any, DataReport], tuple[datasets.Dataset, DataReport] | None]


class Part:
    """The rows of one source, read when first needed and kept in the cache, if there is one."""

    def __init__(self, source: Source, root: Path | None, streaming: bool = False) -> None:
        self.source, self.root, self.streaming = source, root, streaming

    @cached_property
    def key(self) -> str:
        return key_of("rows", self.source.identity())

    @cached_property
    def rows(self) -> datasets.Dataset:
        if self.root is None:
            return self.source.load()
        folder = cached_folder(
            self.root, f"rows-{self.key}", lambda folder: self.source.load(folder / "rows.arrow") and None
        )
        return open_arrow(folder, "rows")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Each row, from the stream or from the cache, a thousand at a time: a memory-mapped row costs more to fetch alone."""
        if self.streaming:
            yield from self.source.checked(streaming=True)
            return
        for batch in self.rows.iter(batch_size=1000):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

    @cached_property
    def form(self) -> str:
        return detect_form(next(iter(self)))

    def tokens(self, encoder: Encoder, name: str, num_proc: int | None) -> datasets.Dataset:
        if self.root is None:
            return tokenise(self.rows, encoder, name=name, num_proc=num_proc)
        key = key_of("tokens", self.key, self.source.seed, tokenizer_key(encoder.tokenizer), encoder.settings())

        def build(folder: Path) -> None:
            tokenise(self.rows, encoder, name=name, num_proc=num_proc, file=folder / "tokens.arrow")

        return open_arrow(cached_folder(self.root, f"tokens-{key}", build), "tokens")


# -------------------------------------------------------------------------------------------------------------------- leakage


def question_source(name: str) -> Source:
    """The test side of one entry of leakage_check: a path, or a Hub id with its configuration ("openai/gsm8k:main")."""
    source, colon, config = name.partition(":")
    is_hub = colon and not Path(name).expanduser().exists()
    return Source(source, config, split="test") if is_hub else Source(name, split="test")


def _test_questions(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        count = 0
        for count, (where, row) in enumerate(question_source(name).read(), start=1):
            text = question_of(row) if isinstance(row, dict) else None
            if text is None:
                raise DataError(
                    f"{where}: leakage_check finds no question. A row needs one of: {', '.join(FIELDS)}. Give another file."
                )
            yield str(row.get("id") or f"{name}:{count}"), text
        if not count:
            raise DataError(
                f"leakage_check={name!r} holds no rows, so there is nothing to compare with. Give another file."
            )


def row_question(row: dict[str, Any]) -> str:
    """What of a training row is compared with the test questions: the question where it has one, all of it otherwise."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"] if message["role"] == "user")
    return next(row[name] for name in ("query", "question", "prompt", "text") if name in row)


def check_leakage(part: Part, data: DataArguments) -> LeakageReport:
    """leakage_check's test questions in the rows of `part`; cached, by the content of both sides, where the rows are."""
    names = data.leakage_check or []

    def compare() -> LeakageReport:
        index = QuestionIndex(_test_questions(names), data.leakage_ngram)
        return find_leaks(map(row_question, part), index, names, data.leakage_share)

    if part.root is None or (
        part.streaming and part.source.files() is None
    ):  # a Hub stream has no content to name before it is read
        return compare()
    identities = [(name, question_source(name).identity()) for name in names]
    key = key_of("leakage", part.key, identities, data.leakage_ngram, data.leakage_share)
    folder = cached_folder(
        part.root, f"leakage-{key}", lambda folder: write_text(folder / "report.json", json.dumps(asdict(compare())))
    )
    return LeakageReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))


# ------------------------------------------------------------------------------------------------------------------- all of it


def _tokenizer(recipe: Recipe, part: Part) -> Any:
    """load_tokenizer's, with one trained on the rows kept in the cache: training it takes as long as tokenising."""
    data, model = recipe.data, recipe.model
    options: dict[str, Any] = {
        "trust_remote_code": recipe.training.trust_remote_code,
        "chat_template_path": recipe.training.chat_template_path,
    }
    if model.tokenizer_vocab_size is None:
        return load_tokenizer(model, **options)

    def train() -> Any:
        texts = ("".join(row_texts(row, data.prompt_template, data.response_separator)) for row in part)
        return load_tokenizer(model, texts=texts, **options)

    if part.root is None or part.streaming:
        return train()
    key = key_of("tokenizer", part.key, data.prompt_template, data.response_separator, model.tokenizer_vocab_size)
    folder = cached_folder(part.root, f"tokenizer-{key}", lambda folder: train().save_pretrained(str(folder)) and None)
    return load_tokenizer(
        dataclasses.replace(model, tokenizer_name_or_path=str(folder), tokenizer_vocab_size=None), **options
    )


def prepare_data(recipe: Recipe, *, say: Callable[[str], None] = print, dry_run: bool = False) -> Prepared:
    """Tokenizer, training set and held-out set (or None), each with its report.

    Raises:
        DataError: a row cannot be read, nothing is left to train on, or `leakage: stop` found test questions.
    """
    with recipe.training.main_process_first(desc="reading and tokenising"):
        return _prepare(recipe, say, dry_run)


def _prepare(recipe: Recipe, say: Callable[[str], None], dry_run: bool) -> Prepared:
    data, training, root = recipe.data, recipe.training, cache_root()
    if root is None:
        say(
            f"=> nothing is cached: {datasets.config.HF_DATASETS_CACHE} cannot be written. Set HF_DATASETS_CACHE to a folder that can."
        )
    source = Source(
        str(data.dataset),
        data.dataset_config,
        data.dataset_split,
        data.max_train_rows,
        data.builtin_rows,
        training.seed,
    )
    part = Part(source, root, data.streaming)
    tokenizer = _tokenizer(recipe, part)
    leaked = _leaked(recipe, part, say, dry_run) if data.leakage_check else []

    def encoder(rows: Part) -> Encoder:
        return Encoder(
            tokenizer, rows.form, data.prompt_template, data.response_separator, training.max_length, data.too_long
        )

    if data.streaming:
        seed = training.seed if training.data_seed is None else training.data_seed
        stream = TokenStream(source, encoder(part), seed, data.streaming_buffer, frozenset(leaked))
        train: tuple[Any, DataReport] = (stream.dataset(), stream.sample("train")[1])
    else:
        used = encoder(part)
        train = keep(part.tokens(used, "train", training.dataset_num_proc), used, "train", leaked)
    held_out = None
    if data.eval_dataset is not None:
        test = Part(
            Source(
                data.eval_dataset,
                data.dataset_config,
                data.eval_split,
                data.max_eval_rows,
                data.builtin_eval_rows,
                training.seed,
            ),
            root,
        )
        used = encoder(test)
        held_out = keep(test.tokens(used, "held out", training.dataset_num_proc), used, "held out")
    if not (training.packing or training.eval_packing or training.shuffle_dataset):
        # TRL would cut each row once more, one by one, and write a second copy of all of them
        given: dict[str, Any] = dict(training.dataset_kwargs or {})  # type: ignore[arg-type]
        training.dataset_kwargs = {**given, "skip_prepare_dataset": True}
    return tokenizer, train, held_out


def _leaked(recipe: Recipe, part: Part, say: Callable[[str], None], dry_run: bool) -> list[int]:
    """The rows to leave out, after the log, the file and the refusal that the recipe asks for."""
    report = check_leakage(part, recipe.data)
    say("\n".join(f"=> {line}" for line in report.lines()))
    path = Path(str(recipe.training.output_dir)) / LEAKAGE
    if not dry_run and recipe.training.process_index == 0:
        write_text(path, json.dumps({"action": recipe.data.leakage, **asdict(report)}, indent=1) + "\n")
    if recipe.data.leakage == "stop" and report.leaked:
        first = report.examples[0]
        raise DataError(
            f"leakage='stop': {len(report.leaked)} of {report.rows} training rows hold test questions, the first is row {first['row']} "
            f"({first['test']}){'' if dry_run else f'; all are in {path}'}. Set leakage to drop to leave them out, or to report to train "
            "on them."
        )
    return report.leaked if recipe.data.leakage == "drop" else []
