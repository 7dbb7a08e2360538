"""Minutes and memory for a data set of MetaMathQA's size and shape.

The phases: read and tokenise, find it in the cache, stream it, look for test questions in it.

    python benchmarks/data_scale.py         # 395,000 rows, about 6 minutes on 2 free cores, 2 GB of disk
    python benchmarks/data_scale.py --rows 5000
    python benchmarks/data_scale.py --test data/gsm8k/test.jsonl data/math/test.jsonl

The rows come from matrix_llm.data.wordproblems: as many as MetaMathQA has, with its columns and about its lengths
(query 240 characters, response 470, the longest rows ten times that). One row in PLANTED is a test question, which the
leakage check must find. Everything is written to a temporary folder, which is removed at the end. Each phase is a
process of its own; its memory is that of all its processes together, read ten times a second: RSS, and the part of it
that is not a page of a mapped file ("anonymous"), which is what must fit.
"""

import sys
from pathlib import Path

if not __package__:
    # run as a script: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from matrix_llm.data import wordproblems

ROWS = 395_000
PLANTED = 1000
POOL = 20_000
PHASES = ("first run", "second run", "streaming", "leakage check", "leakage check, cached")
SETTINGS = {
    "model_config": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1,
    },
    "prompt_template": "metamath", "max_length": 512, "use_cpu": True, "bf16": False, "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip


def write_rows(path: Path, count: int, planted: list[str], seed: int = 0) -> None:
    """Rows with MetaMathQA's columns: one to three problems a query, one to fifty solutions a response, mostly few."""
    pool = wordproblems.generate(min(POOL, 4 * count), seed=seed)
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            asked = rng.sample(pool, rng.choice((1, 2, 2, 3)))
            solved = rng.choices(pool, k=max(1, min(50, round(rng.lognormvariate(1.5, 0.6)))))
            row = {
                "query": " ".join(problem.query for problem in asked),
                "response": " ".join(problem.response.replace("\nThe answer is: ", " ####") for problem in solved)
                + f"\nThe answer is: {solved[-1].answer}",
                "type": asked[0].type,
                "original_question": " ".join(problem.original_question for problem in asked),
            }
            if number % PLANTED == PLANTED - 1:
                row["query"] = planted[number // PLANTED % len(planted)]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_test(path: Path, count: int, seed: int) -> list[str]:
    """Questions in the form of GSM8K's test file, their words reversed, so that none shares 13 words with a row."""
    problems = wordproblems.generate(count, seed=seed, split="test")
    questions = [" ".join(reversed(problem.original_question.split())) for problem in problems]
    path.write_text(
        "".join(json.dumps({"question": question, "answer": "#### 1"}) + "\n" for question in questions),
        encoding="utf-8",
    )
    return questions


def prepare(folder: Path, count: int, tests: list[Path]) -> tuple[Path, list[Path]]:
    """The rows, the test sets and a tokenizer in `folder`."""
    from matrix_llm.model.tokenizer import train_tokenizer

    planted: list[str] = []
    for size, name in ((1319, "grade_school"), (5000, "competition")) if not tests else ():
        tests = [*tests, folder / f"{name}.jsonl"]
        planted += write_test(tests[-1], min(size, count), seed=size)
    for path in tests if not planted else ():
        with path.open(encoding="utf-8") as file:
            planted += [row.get("question") or row["problem"] for row in map(json.loads, file)]
    write_rows(folder / "rows.jsonl", count, random.Random(1).sample(planted, min(len(planted), 500)))
    with (folder / "rows.jsonl").open(encoding="utf-8") as file:
        texts = [line for line, _ in zip(file, range(max(count // 80, 300)), strict=False)]
    train_tokenizer(texts, 4000).save_pretrained(str(folder / "tokenizer"))
    return folder / "rows.jsonl", tests


def run_phase(phase: str, folder: Path, rows: str, tests: list[str], num_proc: int | None) -> dict[str, Any]:
    """Run one phase in this process; main prints the numbers that it returns as JSON."""
    from matrix_llm.config import load_recipe
    from matrix_llm.run.prepare import prepare_data

    settings: dict[str, Any] = {
        **SETTINGS, "dataset": rows, "tokenizer_name_or_path": str(folder / "tokenizer"), "dataset_num_proc": num_proc,
        "output_dir": str(folder / "run"),
    }  # fmt: skip
    if phase == "streaming":
        settings |= {"streaming": True, "max_steps": 10}
    if phase.startswith("leakage"):
        settings |= {"leakage_check": tests, "leakage": "drop"}
    (folder / "recipe.yaml").write_text(json.dumps(settings))
    started = time.perf_counter()
    recipe = load_recipe(folder / "recipe.yaml", dry_run=True)
    prepared = prepare_data(recipe, say=lambda text: print(text, file=sys.stderr))
    dataset, report = prepared.train, prepared.report
    found: dict[str, Any] = {"rows_kept": report.rows_kept, "dropped_leaked": report.dropped_leaked}
    if phase == "streaming":
        stream = iter(dataset)
        found["first_batch"] = len([next(stream) for _ in range(16)])
        found["start_seconds"] = time.perf_counter() - started
        clock = time.perf_counter()
        count = sum(1 for _, _ in zip(range(20_000), stream, strict=False))
        found["rows_per_second"] = count / (time.perf_counter() - clock)
    else:
        found["tokens"] = report.tokens
        print("\n".join(report.lines()), file=sys.stderr)
        [dataset[i] for i in random.Random(0).sample(range(len(dataset)), min(1000, len(dataset)))]
    return {"work_seconds": time.perf_counter() - started, **found}


def _tree(root: int) -> Iterator[int]:
    yield root
    try:
        for task in Path(f"/proc/{root}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _tree(int(child))
    except OSError:
        return


def _memory(pid: int) -> tuple[int, int]:
    """(RSS, anonymous RSS) of one process, in kB."""
    try:
        lines = dict(
            line.split(":", 1)
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith(("VmRSS", "RssAnon"))
        )
        return int(lines["VmRSS"].split()[0]), int(lines["RssAnon"].split()[0])
    except (OSError, KeyError):
        return 0, 0


def watch(command: list[str], env: dict[str, str], log: Path) -> dict[str, Any]:
    """Run a phase; return its numbers, the seconds from start to exit, and the peak of its processes' memory."""
    started, peak, peak_anonymous, before = time.perf_counter(), 0, 0, os.times()
    with (
        log.open("w") as errors,
        tempfile.TemporaryFile("w+") as out,
        subprocess.Popen(command, env=env, stdout=out, stderr=errors) as process,
    ):
        while process.poll() is None:
            found = [_memory(pid) for pid in _tree(process.pid)]
            peak = max(peak, sum(rss for rss, _ in found))
            peak_anonymous = max(peak_anonymous, sum(anonymous for _, anonymous in found))
            time.sleep(0.1)
        seconds = time.perf_counter() - started
        out.seek(0)
        lines = out.read().splitlines()
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command[1:])} failed:\n{log.read_text()[-3000:]}")
    used = os.times()
    cpu = used.children_user + used.children_system - before.children_user - before.children_system
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_gib": peak / 2**20,
        "anonymous_gib": peak_anonymous / 2**20,
        **json.loads(lines[-1]),
    }


def measure(count: int, tests: list[Path], num_proc: int | None = None) -> dict[str, dict[str, Any]]:
    """Run all phases in order on a file made for the purpose."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock = time.perf_counter()
        rows, tests = prepare(folder, count, [path.absolute() for path in tests])
        results["file"] = {"rows": count, "mib": rows.stat().st_size / 2**20, "seconds": time.perf_counter() - clock}
        env = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        for phase in PHASES:
            options = [
                "--phase",
                phase,
                "--folder",
                name,
                "--test",
                *map(str, tests),
                *(["--num_proc", str(num_proc)] if num_proc else []),
            ]
            results[phase] = watch([sys.executable, str(Path(__file__).resolve()), *options], env, folder / "log.txt")
            print((folder / "log.txt").read_text()[-2000:], file=sys.stderr)
        cached = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
        results["cache"] = {"mib": cached / 2**20}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure reading, caching, streaming and the leakage check at MetaMathQA's size."
    )
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument(
        "--test", type=Path, nargs="*", default=[], help="JSONL test sets (default: 1,319 + 5,000 generated questions)"
    )
    parser.add_argument("--num_proc", type=int, help="dataset_num_proc of the recipe")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        tests = [str(path) for path in options.test]
        print(
            json.dumps(
                run_phase(options.phase, options.folder, str(options.folder / "rows.jsonl"), tests, options.num_proc)
            )
        )
        return
    for name, result in measure(options.rows, options.test, options.num_proc).items():
        print(
            f"{name:22} "
            + ", ".join(f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in result.items())
        )


if __name__ == "__main__":
    main()
