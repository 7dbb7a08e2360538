"""From a recipe to all the data that training needs: tokenizer, training rows, held-out rows and problems.

Rows come from the cache or from a stream, are checked for test questions, and are measured. Under `accelerate launch`
each machine's first process reads, tokenises and writes the cache while the others wait, and then open what it wrote.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets

from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.base.files import write_text
from matrix_llm.config import DataArguments, Recipe
from matrix_llm.data.cache import cache_root, cached_folder, key_of
from matrix_llm.data.leakage import FIELDS, LeakageReport, QuestionIndex, find_leaks, question_of
from matrix_llm.data.readers import Source
from matrix_llm.data.rowset import RowSet
from matrix_llm.data.selection import DataReport, drop_unusable
from matrix_llm.data.streaming import TokenStream
from matrix_llm.data.tokens import Encoder
from matrix_llm.model.tokenizer import load_tokenizer
from matrix_llm.run.decode import final_answer

LEAKAGE = "leakage.json"


@dataclass(frozen=True)
class HeldOutProblem:
    """A question with a final answer to compare with."""

    query: str
    """The question, without the prompt template."""
    answer: str
    """As `final_answer` spells it."""


@dataclass(frozen=True)
class Prepared:
    """The data of a run, as `prepare_data` returns it."""

    tokenizer: Any
    """The tokenizer, loaded or trained on the training rows."""
    train: datasets.Dataset | datasets.IterableDataset
    """input_ids, labels and row_id of the rows to train on."""
    report: DataReport
    """What became of the training rows."""
    held_out: datasets.Dataset | None
    """The rows for the evaluation loss, in the same form as `train`; None without eval_dataset."""
    held_out_report: DataReport | None
    """What became of the held-out rows."""
    problems: list[HeldOutProblem]
    """What greedy accuracy is measured on; empty if accuracy_rows is 0."""
    dataset_kwargs: dict[str, Any] | None
    """The trainer's `dataset_kwargs`."""


def prepare_data(recipe: Recipe, *, say: Callable[[str], None] = print, dry_run: bool = False) -> Prepared:
    """Read and tokenise what the recipe names; the recipe itself is not changed.

    Args:
        say: prints a line for the log.
        dry_run: write nothing to the output directory.

    Raises:
        DataError: a row cannot be read, nothing is left to train on, or `leakage: stop` found test questions.
        RecipeError: accuracy_rows asks for problems, but there are none.
    """
    with recipe.training.main_process_first(desc="reading and tokenising"):
        return _prepare(recipe, say, dry_run)


def _prepare(recipe: Recipe, say: Callable[[str], None], dry_run: bool) -> Prepared:
    data, training = recipe.data, recipe.training

    # 1. The training rows and a tokenizer, trained on them if the recipe asks for it
    root = cache_root()
    if root is None:
        folder = datasets.config.HF_DATASETS_CACHE
        say(f"=> nothing is cached: {folder} cannot be written. Set HF_DATASETS_CACHE to a folder that can.")
    rows = RowSet(_training_source(recipe), root, streaming=data.streaming)
    tokenizer = _load_tokenizer(recipe, rows)

    # 2. Test questions among them
    leaked = _check_leakage(recipe, rows, say, dry_run) if data.leakage_check else []

    # 3. Their tokens
    encoder = _make_encoder(recipe, tokenizer, rows)
    train: datasets.Dataset | datasets.IterableDataset
    if data.streaming:
        seed = training.seed if training.data_seed is None else training.data_seed
        stream = TokenStream(rows.source, encoder, seed, data.streaming_buffer, frozenset(leaked))
        train, report = stream.dataset(), stream.sample("train")[1]
    else:
        tokens = rows.tokens(encoder, "train", num_proc=training.dataset_num_proc)
        train, report = drop_unusable(tokens, encoder, "train", leaked)

    # 4. The held-out rows, read once for two uses: the evaluation loss and greedy accuracy
    held_out, held_out_report, problems = None, None, []
    if data.eval_dataset is not None or data.accuracy_rows:
        eval_rows = _count_eval_rows(data)
        others = RowSet(_held_out_source(recipe, eval_rows), root)
        if data.accuracy_rows:
            problems = _find_problems(others, data.accuracy_rows)
        if data.eval_dataset is not None:
            encoder = _make_encoder(recipe, tokenizer, others)
            tokens = others.tokens(encoder, "held out", count=eval_rows, num_proc=training.dataset_num_proc)
            held_out, held_out_report = drop_unusable(tokens, encoder, "held out")

    return Prepared(tokenizer, train, report, held_out, held_out_report, problems, _dataset_kwargs(recipe))


def _dataset_kwargs(recipe: Recipe) -> dict[str, Any] | None:
    """Settings that stop TRL, without packing or shuffling, from cutting each row again and writing a second copy."""
    training = recipe.training
    is_prepared_by_trl = training.packing or training.eval_packing or training.shuffle_dataset
    return None if is_prepared_by_trl else {"skip_prepare_dataset": True}


# --- tokenizer and encoder --------------------------------------------------------------------------------------------


def _training_source(recipe: Recipe) -> Source:
    data = recipe.data
    return Source(
        name=str(data.dataset),
        config=data.dataset_config,
        split=data.dataset_split,
        max_rows=data.max_train_rows,
        builtin_rows=data.builtin_rows,
        seed=recipe.training.seed,
    )


def _load_tokenizer(recipe: Recipe, rows: RowSet) -> Any:
    """The recipe's tokenizer. One that is trained on the rows is cached: training it takes as long as tokenising."""
    data, model = recipe.data, recipe.model
    options: dict[str, Any] = {
        "trust_remote_code": recipe.training.trust_remote_code,
        "chat_template_path": recipe.training.chat_template_path,
    }
    if model.tokenizer_vocab_size is None:
        return load_tokenizer(model, **options)

    def train() -> Any:
        return load_tokenizer(model, texts=rows.texts(data.prompt_template, data.response_separator), **options)

    def build(folder: Path) -> None:
        train().save_pretrained(str(folder))

    if rows.root is None or rows.streaming:
        return train()
    key = key_of("tokenizer", rows.key, data.prompt_template, data.response_separator, model.tokenizer_vocab_size)
    folder = cached_folder(rows.root, f"tokenizer-{key}", build)
    saved = dataclasses.replace(model, tokenizer_name_or_path=str(folder), tokenizer_vocab_size=None)
    return load_tokenizer(saved, **options)


def _make_encoder(recipe: Recipe, tokenizer: Any, rows: RowSet) -> Encoder:
    if recipe.training.assistant_only_loss and rows.layout == "text":
        raise RecipeError(
            f"assistant_only_loss=True, but the rows of {rows.source} are texts, without turns, and every token of "
            "them is trained. Remove it, or give rows with messages."
        )
    return Encoder(
        tokenizer,
        rows.layout,
        prompt_template=recipe.data.prompt_template,
        response_separator=recipe.data.response_separator,
        max_length=recipe.training.max_length,
        too_long=recipe.data.too_long,
    )


# --- held-out rows ----------------------------------------------------------------------------------------------------


def _count_eval_rows(data: DataArguments) -> int | None:
    """How many held-out rows the evaluation loss is computed on; None for all."""
    if data.eval_dataset != "builtin":
        return data.max_eval_rows
    return min(data.builtin_eval_rows, data.max_eval_rows or data.builtin_eval_rows)


def _held_out_source(recipe: Recipe, eval_rows: int | None) -> Source:
    """As many rows as the larger of the two uses needs; each use takes its own number of rows from the start."""
    data = recipe.data
    if data.eval_dataset is None:  # "builtin", whose test problems need no separate name
        count: int | None = data.accuracy_rows
    else:
        count = None if eval_rows is None else max(eval_rows, data.accuracy_rows)
    return Source(
        name=str(data.eval_dataset or data.dataset),
        config=data.dataset_config,
        split=data.eval_split,
        max_rows=count,
        builtin_rows=count or data.builtin_eval_rows,
        seed=recipe.training.seed,
    )


def _find_problems(rows: RowSet, count: int) -> list[HeldOutProblem]:
    """Those of the first `count` rows that have a question and a final answer."""
    problems = []
    for row in itertools.islice(rows, count):
        answer = final_answer(row.answer) if row.layout == "template" else None
        if answer is not None:
            problems.append(HeldOutProblem(row.question, answer))
    if not problems:
        raise RecipeError(
            f"accuracy_rows={count}, but none of the first {count} rows of {rows.source} has a question and a final "
            "answer ('The answer is: 7' or '#### 7'). Set accuracy_rows: 0."
        )
    return problems


# --- leakage ----------------------------------------------------------------------------------------------------------


def question_source(name: str) -> Source:
    """The rows of one entry of leakage_check: a path, or a Hub id with its configuration ("openai/gsm8k:main")."""
    source, colon, config = name.partition(":")
    if colon and not Path(name).expanduser().exists():
        return Source(source, config, split="test")
    return Source(name, split="test")


def _test_questions(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(id, question) of each row of each test set. Rows need only a question, not be trainable."""
    for name in names:
        count = 0
        for count, (where, found) in enumerate(question_source(name).read(), start=1):
            text = question_of(found) if isinstance(found, dict) else None
            if text is None:
                raise DataError(
                    f"{where}: leakage_check finds no question. A row needs one of: {', '.join(FIELDS)}. "
                    "Give another file."
                )
            yield str(found.get("id") or f"{name}:{count}"), text
        if not count:
            raise DataError(
                f"leakage_check={name!r} holds no rows, so there is nothing to compare with. Give another file."
            )


def _find_leaks(rows: RowSet, data: DataArguments) -> LeakageReport:
    """Compare the rows with leakage_check's test questions; cached by the content of both sides."""
    names = data.leakage_check or []

    def compare() -> LeakageReport:
        index = QuestionIndex(_test_questions(names), data.leakage_ngram)
        return find_leaks((row.asked for row in rows), index, names, data.leakage_share)

    def build(folder: Path) -> None:
        write_text(folder / "report.json", json.dumps(asdict(compare())))

    is_hub_stream = rows.streaming and rows.source.files() is None  # its content has no key before it is read
    if rows.root is None or is_hub_stream:
        return compare()
    identities = [(name, question_source(name).identity()) for name in names]
    key = key_of("leakage", rows.key, identities, data.leakage_ngram, data.leakage_share)
    folder = cached_folder(rows.root, f"leakage-{key}", build)
    return LeakageReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))


def _check_leakage(recipe: Recipe, rows: RowSet, say: Callable[[str], None], dry_run: bool) -> list[int]:
    """Report leaked rows, write the file or refuse, as the recipe asks, and return the ids of the rows to leave out."""
    report = _find_leaks(rows, recipe.data)
    say("\n".join(f"=> {line}" for line in report.lines()))
    path = Path(str(recipe.training.output_dir)) / LEAKAGE
    if not dry_run and recipe.training.process_index == 0:
        write_text(path, json.dumps({"action": recipe.data.leakage, **asdict(report)}, indent=1) + "\n")
    if recipe.data.leakage == "stop" and report.leaked:
        first = report.examples[0]
        listed = "" if dry_run else f"; all are in {path}"
        raise DataError(
            f"leakage='stop': {len(report.leaked)} of {report.rows} training rows hold test questions, "
            f"the first is row {first['row']} ({first['test']}){listed}. "
            "Set leakage to drop to leave them out, or to report to train on them."
        )
    return report.leaked if recipe.data.leakage == "drop" else []
