"""From a recipe to all the data that training needs: tokenizer, training rows, held-out rows and problems.

Rows come from the cache or from a stream, are checked for test questions, and are measured. Under `accelerate launch`
each machine's first process reads, tokenises and writes the cache while the others wait, and then open what it wrote.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PretrainedConfig

from matrix_llm.base.errors import DataError, RecipeError
from matrix_llm.base.files import write_text
from matrix_llm.config import DataArguments, Recipe
from matrix_llm.data.cache import cache_root, cached_folder, key_of
from matrix_llm.data.entries import DatasetEntry, question_source
from matrix_llm.data.leakage import FIELDS, LeakageReport, QuestionIndex, find_leaks, question_of
from matrix_llm.data.mixture import TokenSet, mix
from matrix_llm.data.prompts import CHAT, resolve_template
from matrix_llm.data.readers import Source
from matrix_llm.data.rowset import RowSet
from matrix_llm.data.selection import DataReport
from matrix_llm.data.streaming import StreamedSet, TokenStream
from matrix_llm.data.tokens import Encoder
from matrix_llm.model.load import load_config, position_limit
from matrix_llm.model.teacher import read_teacher_config
from matrix_llm.model.tokenizer import load_tokenizer
from matrix_llm.run.decode import ANSWER_MARKER, final_answer, prompts_of

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
    held_out: datasets.Dataset | dict[str, datasets.Dataset] | None
    """The rows for the evaluation loss, in the same form as `train`; by name if eval_dataset gives names."""
    held_out_report: DataReport | None
    """What became of the held-out rows; with one part for each data set if there are several."""
    problems: list[HeldOutProblem]
    """What greedy accuracy is measured on; empty if accuracy_rows is 0."""
    dataset_kwargs: dict[str, Any] | None
    """The trainer's `dataset_kwargs`."""


def prepare_data(
    recipe: Recipe,
    *,
    say: Callable[[str], None] = print,
    dry_run: bool = False,
    read: PretrainedConfig | None = None,
) -> Prepared:
    """Read and tokenise what the recipe names; the recipe itself is not changed.

    Args:
        say: prints a line for the log.
        dry_run: write nothing to the output directory.
        read: the configuration of `model_name_or_path`, where it has been read already.

    Raises:
        DataError: a row cannot be read, nothing is left to train on, or `leakage: stop` found test questions.
        RecipeError: accuracy_rows asks for problems, but there are none.
    """
    with recipe.training.main_process_first(desc="reading and tokenising"):
        return _prepare(recipe, say, dry_run, read)


def _prepare(recipe: Recipe, say: Callable[[str], None], dry_run: bool, read: PretrainedConfig | None) -> Prepared:
    data, training = recipe.data, recipe.training

    # 1. The training rows and a tokenizer, trained on them if the recipe asks for it
    root = cache_root()
    if root is None:
        folder = datasets.config.HF_DATASETS_CACHE
        say(f"=> nothing is cached: {folder} cannot be written. Set HF_DATASETS_CACHE to a folder that can.")
    entries = data.training_entries()
    sets = [RowSet(data.training_source(entry, training.seed), root, streaming=data.streaming) for entry in entries]
    tokenizer = _load_tokenizer(recipe, sets, read)

    for line in _idle_settings(recipe, sets):
        say(f"=> {line}")
    for rows in sets if not data.streaming else []:  # a stream from the Hub would be opened once more
        if unread := rows.source.unread_fields():
            say(f"=> {rows.source}: fields that are not read: {', '.join(unread)}")

    # 2. Test questions among them
    leaked = _check_leakage(recipe, sets, say, dry_run) if data.leakage_check else [[] for _ in sets]

    # 3. Their tokens, as often as the weights say
    seed = training.seed if training.data_seed is None else training.data_seed
    train: datasets.Dataset | datasets.IterableDataset
    if data.streaming:
        streamed = [
            StreamedSet(rows.source, _make_encoder(recipe, tokenizer, rows), entry.weight, frozenset(of_it))
            for rows, entry, of_it in zip(sets, entries, leaked, strict=True)
        ]
        stream = TokenStream(streamed, seed, data.streaming_buffer)
        train, report = stream.dataset(), stream.sample("train")
    else:
        tokens = [
            dataclasses.replace(_tokenise(recipe, tokenizer, rows, "train"), weight=entry.weight, leaked=of_it)
            for rows, entry, of_it in zip(sets, entries, leaked, strict=True)
        ]
        train, report = mix(tokens, "train", seed)

    # 4. The held-out rows
    held_out, held_out_report, problems = _prepare_held_out(recipe, tokenizer, root, read)
    return Prepared(tokenizer, train, report, held_out, held_out_report, problems, _dataset_kwargs(recipe))


def _tokenise(recipe: Recipe, tokenizer: Any, rows: RowSet, name: str, count: int | None = None) -> TokenSet:
    encoder = _make_encoder(recipe, tokenizer, rows)
    try:
        tokens = rows.tokens(encoder, name, count=count, num_proc=recipe.training.dataset_num_proc)
    except DataError as error:
        if str(rows.source) in str(error):
            raise
        raise DataError(f"{rows.source}: {error}") from None
    return TokenSet(str(rows.source), tokens, encoder)


def _dataset_kwargs(recipe: Recipe) -> dict[str, Any] | None:
    """Settings that stop TRL, without packing or shuffling, from cutting each row again and writing a second copy."""
    training = recipe.training
    is_prepared_by_trl = training.packing or training.eval_packing or training.shuffle_dataset
    return None if is_prepared_by_trl else {"skip_prepare_dataset": True}


# --- tokenizer and encoder --------------------------------------------------------------------------------------------


def _load_tokenizer(recipe: Recipe, sets: Sequence[RowSet], read: PretrainedConfig | None) -> Any:
    """The recipe's tokenizer. One that is trained on the rows is cached: training it takes as long as tokenising."""
    data, model = recipe.data, recipe.model
    options: dict[str, Any] = {
        "trust_remote_code": recipe.training.trust_remote_code,
        "chat_template_path": recipe.training.chat_template_path,
        "eos_token": recipe.training.eos_token,
        "pad_token": recipe.training.pad_token,
    }
    if model.tokenizer_vocab_size is None:
        return load_tokenizer(model, read=read, **options)

    texts = itertools.chain.from_iterable(rows.texts(data.prompt_template, data.response_separator) for rows in sets)
    root = sets[0].root
    if root is None or data.streaming:
        return load_tokenizer(model, texts=texts, **options)

    def build(folder: Path) -> None:  # without the options, which the key does not cover
        load_tokenizer(model, texts=texts).save_pretrained(str(folder))

    keys = [rows.key for rows in sets]
    key = key_of("tokenizer", keys, data.prompt_template, data.response_separator, model.tokenizer_vocab_size)
    folder = cached_folder(root, f"tokenizer-{key}", build)
    saved = dataclasses.replace(model, tokenizer_name_or_path=str(folder), tokenizer_vocab_size=None)
    return load_tokenizer(saved, **options)


def _idle_settings(recipe: Recipe, sets: Sequence[RowSet]) -> list[str]:
    """Settings that the recipe gives, but that say nothing about these data sets or rows of these layouts.

    They are not refused: on the command line, a recipe for the Hub is often given a local file.
    """
    idle = []
    if recipe.data.dataset_config and all(rows.source.is_file or rows.source.name == "builtin" for rows in sets):
        idle.append(f"dataset_config={recipe.data.dataset_config!r} is for the Hub and folders, and does nothing")
    layouts = dict.fromkeys(rows.layout for rows in sets)
    if "template" in layouts:
        return idle
    keys = [key for key in ("prompt_template", "response_separator", "boxed_answers") if key in recipe.resolved]
    if list(layouts) == ["chat"] and recipe.data.prompt_template == CHAT:
        keys.remove("prompt_template")  # what it says is done
    return idle + [
        f"{key}={recipe.resolved[key]!r} is for questions with answers; these rows are {' and '.join(layouts)}"
        for key in keys
    ]


def _check_what_is_trained(recipe: Recipe, rows: RowSet) -> None:
    """Refuse the settings of SFTConfig that say something else than what is done with rows of this layout."""
    for key, way_out in (
        ("assistant_only_loss", "give rows with messages"),
        ("completion_only_loss", "give rows with prompt and completion"),
    ):
        if getattr(recipe.training, key) and rows.layout == "text":
            raise RecipeError(
                f"{key}=True, but the rows of {rows.source} are texts, and every token of them is trained. Remove it, "
                f"or {way_out}."
            )
    if rows.layout == "chat" and recipe.resolved.get("assistant_only_loss") is False:
        raise RecipeError(
            f"assistant_only_loss=False, but of the conversations of {rows.source} only the assistant's turns are "
            "trained. Remove it, or give rows with text, of which everything is."
        )


def _make_encoder(recipe: Recipe, tokenizer: Any, rows: RowSet) -> Encoder:
    _check_what_is_trained(recipe, rows)
    return Encoder(
        tokenizer,
        rows.layout,
        prompt_template=recipe.data.prompt_template,
        response_separator=recipe.data.response_separator,
        train_on=recipe.data.train_on,
        train_prompt=recipe.training.completion_only_loss is False,
        max_length=recipe.training.max_length,
        too_long=recipe.data.too_long,
    )


# --- held-out rows ----------------------------------------------------------------------------------------------------


HeldOut = tuple[datasets.Dataset | dict[str, datasets.Dataset] | None, DataReport | None, list[HeldOutProblem]]


def _prepare_held_out(recipe: Recipe, tokenizer: Any, root: Path | None, read: PretrainedConfig | None) -> HeldOut:
    """The rows for the evaluation loss, a report on them, and the problems for greedy accuracy.

    The first data set is read once for both uses.
    """
    data, seed = recipe.data, recipe.training.seed
    entries, problems = data.held_out_entries(), []
    # 1. The problems: of the first data set, or generated, which needs no name
    sets = []
    for place, entry in enumerate(entries or ([DatasetEntry("builtin")] if data.accuracy_rows else [])):
        count = _count_eval_rows(data, entry) if entries else 0
        wanted = data.accuracy_rows if place == 0 else 0
        sets.append((RowSet(_held_out_source(data.held_out_source(entry, seed), count, wanted), root), count))
        if wanted:
            problems = _find_problems(sets[0][0], wanted)
            _check_room(recipe, tokenizer, problems, read)
    if not entries:
        return None, None, problems
    # 2. The evaluation loss of all of them together, or of each by its name
    tokens = [_tokenise(recipe, tokenizer, rows, "held out", count) for rows, count in sets]
    if not entries[0].name:
        return *mix(tokens, "held out"), problems
    names = [entry.name for entry in entries]
    mixed = [mix([each], f"held out {name}") for name, each in zip(names, tokens, strict=True)]
    return {name: rows for name, (rows, _) in zip(names, mixed, strict=True)}, mix(tokens, "held out")[1], problems


def _count_eval_rows(data: DataArguments, entry: DatasetEntry) -> int | None:
    """How many held-out rows the evaluation loss is computed on; None for all."""
    limit = entry.max_rows or data.max_eval_rows
    return min(data.builtin_eval_rows, limit or data.builtin_eval_rows) if entry.path == "builtin" else limit


def _held_out_source(source: Source, count: int | None, problems: int) -> Source:
    """As many rows as the larger of the two uses needs; each use takes its own number of rows from the start."""
    count = None if count is None else max(count, problems)
    return dataclasses.replace(source, max_rows=count, builtin_rows=count or source.builtin_rows)


def _find_problems(rows: RowSet, count: int) -> list[HeldOutProblem]:
    """Those of the first `count` rows that have a question and a final answer."""
    problems = []
    for row in itertools.islice(rows, count):
        is_problem = row.layout == "template" and row.weight and row.messages is None and row.tools is None
        answer = final_answer(row.answer) if is_problem and _ends_in_number(row.answer) else None
        if answer is not None:
            problems.append(HeldOutProblem(row.question, answer))
    if not problems:
        raise RecipeError(
            f"accuracy_rows={count}, but none of the first {count} rows of {rows.source} has a question and a final "
            "answer ('The answer is: 7' or '#### 7'). Set accuracy_rows: 0."
        )
    return problems


def _ends_in_number(answer: str) -> bool:
    r"""Whether the final answer is a number alone, perhaps with a unit: not \frac{1}{2}, x + 1 or (3, 4)."""
    said = answer.rpartition(ANSWER_MARKER)[2].strip().split("\n")[0]
    return re.fullmatch(r"[-+$\s]*[\d,]*\.?\d*(/\d+)?[%$]?(\s[a-zA-Z ]+)?\.?", said) is not None


# --- the model's positions --------------------------------------------------------------------------------------------


def limit_max_length(recipe: Recipe, *, say: Callable[[str], None], read: PretrainedConfig | None = None) -> None:
    """Keep rows within the model's positions: sets training.max_length where the recipe leaves it open.

    Called before rows are read; it needs the model's configuration alone.

    Raises:
        RecipeError: the recipe's own max_length is beyond them.
    """
    training, scratch = recipe.training, recipe.model.model_config is not None
    positions = position_limit(load_config(recipe.model, None, trust_remote_code=training.trust_remote_code, read=read))
    whose = "the model"
    if training.teacher_model_name_or_path is not None:  # it reads the same rows
        theirs = position_limit(read_teacher_config(training))
        if theirs is not None and (positions is None or theirs < positions):
            positions, scratch = theirs, False
            whose = f"teacher_model_name_or_path={training.teacher_model_name_or_path!r}"
    if positions is None:
        return
    multiple = int(training.pad_to_multiple_of or 1)  # a row that is not too long may be padded beyond the positions
    if multiple > positions:
        raise RecipeError(
            f"{recipe.path}: pad_to_multiple_of={multiple}, but {whose} has {positions} positions, and cannot read "
            "further. Remove it, or set it to 8."
        )
    limit = positions - positions % multiple
    if training.max_length is not None and training.max_length <= limit:
        return
    if recipe.resolved.get("max_length") is not None:
        more = ", or max_position_embeddings in model_config" if scratch else ""
        more += f" (the largest multiple of pad_to_multiple_of={multiple})" if multiple > 1 else ""
        raise RecipeError(
            f"{recipe.path}: max_length={training.max_length}, but {whose} has {positions} positions, and cannot "
            f"read further. Set max_length to at most {limit}{more}."
        )
    instead = training.max_length or "no limit"
    say(f"=> max_length       {limit}, the number of positions of {whose}, instead of {instead}")
    training.max_length = limit


def _check_room(recipe: Recipe, tokenizer: Any, problems: list[HeldOutProblem], read: PretrainedConfig | None) -> None:
    """Refuse greedy answers that would run beyond the model's positions."""
    trusted = recipe.training.trust_remote_code
    limit = position_limit(load_config(recipe.model, None, trust_remote_code=trusted, read=read))
    if limit is None:
        return
    prompts = prompts_of(tokenizer, resolve_template(recipe.data.prompt_template), problems)
    lengths = [len(tokenizer(each)["input_ids"] if isinstance(each, str) else each) for each in prompts]
    longest, wanted = max(lengths), recipe.data.accuracy_max_new_tokens
    if longest + wanted > limit:
        room = f"Set accuracy_max_new_tokens to at most {limit - longest}, or " if longest < limit else "Set "
        raise RecipeError(
            f"accuracy_max_new_tokens={wanted} after a prompt of {longest} tokens, the longest of accuracy_rows="
            f"{recipe.data.accuracy_rows}, is beyond the model's {limit} positions. {room}accuracy_rows to 0."
        )


# --- leakage ----------------------------------------------------------------------------------------------------------


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


def _find_leaks(sets: Sequence[RowSet], data: DataArguments) -> LeakageReport:
    """Compare the rows of all data sets with leakage_check's test questions; cached by the content of both sides."""
    names = data.leakage_check or []

    def compare() -> LeakageReport:
        index = QuestionIndex(_test_questions(names), data.leakage_ngram)
        counts = [0] * len(sets)

        def questions() -> Iterator[str]:
            for place, rows in enumerate(sets):
                for row in rows:
                    counts[place] += 1
                    yield row.asked

        report = find_leaks(questions(), index, names, data.leakage_share)
        report.rows_of_each = counts
        return report

    def build(folder: Path) -> None:
        write_text(folder / "report.json", json.dumps(asdict(compare())))

    # The content of a stream from the Hub has no key before it is read
    is_hub_stream = data.streaming and any(rows.source.files() is None for rows in sets)
    root = sets[0].root
    if root is None or is_hub_stream:
        return compare()
    identities = [(name, question_source(name).identity()) for name in names]
    key = key_of("leakage", [rows.key for rows in sets], identities, data.leakage_ngram, data.leakage_share)
    folder = cached_folder(root, f"leakage-{key}", build)
    return LeakageReport(**json.loads((folder / "report.json").read_text(encoding="utf-8")))


def _check_leakage(
    recipe: Recipe, sets: Sequence[RowSet], say: Callable[[str], None], dry_run: bool
) -> list[list[int]]:
    """Report leaked rows, write the file or refuse, as the recipe asks.

    Returns:
        For each data set, the places of the rows to leave out.
    """
    report = _find_leaks(sets, recipe.data)
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
    leaked = report.leaked if recipe.data.leakage == "drop" else []
    ends = list(itertools.accumulate(report.rows_of_each, initial=0))
    return [[row - start for row in leaked if start <= row < end] for start, end in itertools.pairwise(ends)]
